"""Files that are written whole or not at all, locks, hashes, and JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from utils.system.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


# --- Writing -------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yield an in-memory file whose content replaces `path` when the block ends without an error.

    The content goes to a temporary file beside `path`, is flushed to the disk and then renamed, so
    that neither a kill nor a full disk costs the user the previous checkpoint. Text is UTF-8.

    Raises:
        UserError: the file cannot be written (no permission, disk full); `path` is as it was.
    """
    path = Path(path)
    memory: IO = io.BytesIO() if "b" in mode else io.StringIO(newline="")
    yield memory
    content = memory.getvalue()
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    # A fixed name: the next run overwrites what a killed process left.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        _write(temporary, content, target=path)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_new(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file of a folder that will be renamed when it is complete: no flush, no rename.

    Raises:
        UserError: the file cannot be written.
    """
    _write(Path(path), content, target=Path(path), sync=False)


def _write(path: Path, content: bytes | memoryview, target: Path, sync: bool = True) -> None:
    """Write a new file; an error names `target`, the path that the user knows."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # never write through a link
        with open(path, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        written = path.stat().st_size if path.is_file() else 0
        raise cannot_write(target, error, len(content) - written) from error


def cannot_write(path: str | Path, error: OSError, missing: int | None = None) -> UserError:
    """The one-line error of a failed write; on a full disk it states the `missing` bytes."""
    message = f"{path}: cannot write: {error.strerror or error}"
    if missing and error.errno in DISK_FULL:
        message += f"; {missing:,} bytes did not fit: free some space and run it again"
        message += ", a training run with --resume"
    return UserError(message)


def check_writable(folder: str | Path) -> None:
    """Make a folder and check that files can be written there, before hours of work depend on it.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` within the block, so that a run started twice does not mix files.

    The system releases the lock when its holder dies. On a file system without locks, such as some
    clusters' NFS, the block runs unprotected and a note on stderr says so.

    Raises:
        UserError: another process holds the lock (the message is `busy`), or the lock file cannot
            be created.
    """
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(path, error) from error
        note = f"note: {path.parent}: this file system has no locks; do not start a second process"
        print(note, file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: filelock lets nobody else hold a removed file
        lock.release()


# --- Folders -------------------------------------------------------------------------------------
@contextlib.contextmanager
def new_folder(
    path: str | Path, replace: Iterable[str] = (), keep_partial: bool = False
) -> Iterator[Path]:
    """Yield the folder `.<name>.partial`, which becomes `path` when the block ends without error.

    So a reader finds all files of a data set or of results, or none. What a killed process left is
    removed by the next one, or continued with `keep_partial`. Missing parents are made, and removed
    again if nothing is written. A link at `path` is resolved; links inside are never followed.

    Args:
        path: of the folder; it is free, an empty folder, or to be replaced.
        replace: globs, relative to `path`, of the files that may be replaced together with it.
        keep_partial: leave the files of an interrupted block, for the next call to go on with.

    Raises:
        UserError: `path` holds a file that `replace` does not name, another process is writing it,
            or the disk is full.
    """
    path = Path(path).resolve()
    partial, previous = (path.with_name(f".{path.name}.{end}") for end in ("partial", "previous"))
    missing_parents = [parent for parent in path.parents if not parent.exists()]
    busy = f"{path}: another process is writing it; wait for it"
    try:
        with locked(path.with_name(f".{path.name}.lock"), busy):
            _tidy(path, previous)
            _check_replaceable(path, replace)
            if partial.exists() and not keep_partial:
                shutil.rmtree(partial)
            try:
                partial.mkdir(exist_ok=True)
                yield partial
                _check_replaceable(path, replace)  # the block may have taken hours
                if path.exists():
                    path.rename(previous)
                partial.rename(path)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise cannot_write(path, error) from error
                raise
            finally:
                _tidy(path, previous)
                if not keep_partial:
                    shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):
                    partial.rmdir()  # if it is empty
    finally:
        with contextlib.suppress(OSError):
            for parent in missing_parents:
                parent.rmdir()  # as long as they are empty


def _check_replaceable(path: Path, replace: Iterable[str]) -> None:
    """Raise UserError unless `path` is free, or a folder of nothing but what `replace` names."""
    if not path.exists():
        return
    if not path.is_dir() or (not replace and any(path.iterdir())):
        raise UserError(f"{path}: already exists; choose another --out or remove it first")
    ours = {file for pattern in replace for file in path.glob(pattern)}
    for folder, subfolders, names in os.walk(path):
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for file in (Path(folder, name) for name in links + names):
            if file not in ours:
                raise UserError(
                    f"{file}: would be lost with the results that are replaced; move it elsewhere, "
                    "or choose another --out"
                )


def _tidy(path: Path, previous: Path) -> None:
    """Remove the folder that `path` replaced, or put it back if nothing did."""
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.exists():
        previous.rename(path)


# --- Reading -------------------------------------------------------------------------------------
def read_bytes(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    return digest.hexdigest()


# --- JSON ----------------------------------------------------------------------------------------
def write_json(path: str | Path, value: dict) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object, without the checksum of itself that earlier versions kept in "sha256".

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    value.pop("sha256", None)
    return value


# --- Names ---------------------------------------------------------------------------------------
def is_file_name(text: object) -> bool:
    """Whether `text` is a plain file name, which cannot lead out of its folder on any system."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and not any(character in "/\\:\0" for character in text)
        and text.isprintable()
    )
