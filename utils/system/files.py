"""Atomic writes of files and folders, locks, hashes and JSON."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from utils.system import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Yield an in-memory file whose content replaces `path` when the block ends without an error.

    Neither a kill nor a full disk costs the user the previous checkpoint. Text is UTF-8.

    Raises UserError: the file cannot be written (no permission, disk full); `path` is as it was.
    """
    path = Path(path)
    memory: IO = io.BytesIO() if "b" in mode else io.StringIO(newline="")
    yield memory
    content = memory.getvalue()
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    # A fixed name: the next run removes what a killed process left.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link of that name would be followed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The one-line error of a failed write."""
    return UserError(f"{path}: cannot write: {error.strerror or error}")


@contextlib.contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file `path` within the block; UserError `busy` if another process holds it.

    The system releases it when its holder dies.
    """
    lock = FileLock(path, blocking=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: filelock lets nobody else hold a removed file
        lock.release()


@contextlib.contextmanager
def new_folder(
    path: str | Path, replace: Iterable[str] = (), keep_partial: bool = False
) -> Iterator[Path]:
    """Yield the folder `.<name>.partial`, which becomes `path` when the block ends without error.

    Readers see all files of a data set or of results, or none. Files in `path` that match the globs
    `replace`, relative to it, are replaced together. With keep_partial, the next call finds what an
    interrupted block wrote. A link at `path` is resolved; links inside are not followed.

    Raises UserError: `path` holds another file, another process is writing it, or the disk is full.
    """
    path = Path(path).resolve()
    partial = path.with_name(f".{path.name}.partial")
    missing_parents = [parent for parent in path.parents if not parent.exists()]
    busy = f"{path}: another process is writing it; wait for it"
    try:
        with locked(path.with_name(f".{path.name}.lock"), busy):
            _check_replaceable(path, replace)
            if partial.exists() and not keep_partial:
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            try:
                yield partial
                _check_replaceable(path, replace)  # the block may have taken hours
                if path.exists():
                    shutil.rmtree(path)
                partial.rename(path)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise cannot_write(path, error) from error
            finally:
                if not keep_partial:
                    shutil.rmtree(partial, ignore_errors=True)
                with contextlib.suppress(OSError):
                    partial.rmdir()  # if it is empty
    finally:
        with contextlib.suppress(OSError):
            for parent in missing_parents:
                parent.rmdir()  # as long as they are empty


def check_overwrite(path: Path, overwrite: bool) -> None:
    """Raise UserError if a folder of results is not empty and --overwrite was not given."""
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"{path}: already holds results; replace them with --overwrite, or choose another --out"
        )


def _check_replaceable(path: Path, replace: Iterable[str]) -> None:
    """Raise UserError unless `path` is free, or a folder of nothing but what `replace` names."""
    replaceable = {file for pattern in replace for file in path.glob(pattern)}
    kept = (file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    foreign = next((file for file in kept if file not in replaceable), None)
    if foreign or path.is_file():
        holds = f" and holds {foreign.relative_to(path)}" if foreign else ""
        raise UserError(f"{path}: already exists{holds}; choose another folder or remove it first")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to read; UserError if that fails."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error


def read_bytes(path: str | Path) -> bytes:
    """Read a file; UserError if that fails."""
    with _opened(path) as file:
        return file.read()


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file; UserError if it cannot be read."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: dict) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object; UserError if the file is missing, unreadable, or holds anything else."""
    try:
        value = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def is_file_name(text: str) -> bool:
    """Whether `text` is a plain file name, which cannot lead out of its folder on any system."""
    return text not in ("", ".", "..") and text.isprintable() and not set(text) & set("/\\:")
