"""Files that are whole or absent, that notice damage, and that stay in their folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.system.errors import UserError

CHECKSUM, EDITED = "sha256", "edited"  # an entry of our JSON files, and what excuses from it


# --- Writing -------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """What is written to this file in memory becomes `path` when the block ends without error.

    It is written to a file beside `path` that takes its place when it is whole and on the disk.
    Text is UTF-8 with "\\n" line ends on every system.

    Raises:
        UserError: the file cannot be written (no permission, disk full); `path` is as it was.
    """
    path = Path(path)
    if "b" in mode:
        memory: IO = io.BytesIO()
        yield memory
        content = memory.getbuffer()
    else:
        memory = io.StringIO(newline="")
        yield memory
        content = memory.getvalue().encode("utf-8", errors="backslashreplace")
    # The same name each time: what a process that was killed left behind is written over. Two
    # processes that would write one file have to be kept apart by `locked`.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, content, meant=path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_new(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file into a folder that is itself aside and renamed when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    _write(Path(path), content, meant=Path(path), sync=False)


def _write(path: Path, content: bytes | memoryview, meant: Path, sync: bool = True) -> None:
    """Write a new file; an error is about `meant`, the path that the user knows."""
    content, written = memoryview(content), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link in its place is not followed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags, 0o666)
        try:
            while written < len(content):
                written += os.write(handle, content[written : written + (1 << 30)])
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise cannot_write(meant, error, len(content) - written) from error


def cannot_write(path: str | Path, error: OSError, missing: int | None = None) -> UserError:
    """The one line for a write that failed; `missing` bytes found no room, if that is known."""
    line = f"{path}: cannot write: {error.strerror or error}"
    if missing and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += f"; {missing:,} bytes found no room: free some and run it again"
        line += ", a training with --resume"
    return UserError(line)


def _sync_folder(folder: Path) -> None:
    """Have a renamed file's name on the disk as well, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(folder: str | Path) -> None:
    """Make a folder and see that files can be written there, before hours of work go into them.

    Raises:
        UserError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` within the block; the system lets go of it when a process dies.

    Raises:
        UserError: `busy`, if another process holds it; or the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        except FileNotFoundError:  # its holder has just removed it
            pass
        except OSError as error:
            file.close()
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise UserError(busy) from None
            raise cannot_write(path, error) from error
        file.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows: not while it is open
            path.unlink()
        file.close()


def _lock(file: IO) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # no locks there
            raise


# --- Reading -------------------------------------------------------------------------------------
def read_bytes(path: str | Path) -> bytes:
    """A file's content.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


# --- JSON that notices damage --------------------------------------------------------------------
def write_json(path: str | Path, value: dict) -> None:
    """Write `value` as indented JSON, atomically, with a checksum of itself."""
    with atomic_write(path, "w") as file:
        json.dump(
            value | {CHECKSUM: _checksum(value)},
            file,
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
        file.write("\n")


def read_json(path: str | Path) -> dict:
    """Read what `write_json` wrote, without the checksum.

    Who edits such a file by hand says so by "sha256": "edited".

    Raises:
        UserError: the file is missing, unreadable, not a JSON object, or damaged.
    """
    try:
        value = json.loads(
            read_bytes(path), object_pairs_hook=_without_repetition, parse_constant=_refuse
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    if CHECKSUM not in value:
        raise UserError(
            f"{path}: has no {CHECKSUM}: damaged, or of an earlier version; make it again"
        )
    checksum = value.pop(CHECKSUM)
    if checksum not in (EDITED, _checksum(value)):
        raise UserError(
            f"{path}: damaged, or changed since it was written; restore it, or, if it was changed "
            f'on purpose, set "{CHECKSUM}" in it to "{EDITED}"'
        )
    return value


def _checksum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


# --- Names ---------------------------------------------------------------------------------------
def is_file_name(text: object) -> bool:
    """Whether `text` names a file in a folder, on every system, and cannot lead out of it."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and not any(character in "/\\:\0" for character in text)
        and text.isprintable()
    )
