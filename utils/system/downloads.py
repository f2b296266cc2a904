"""Public files fetched: resumable, checked, whole or absent; archives that stay in their folder."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.system.errors import UserError
from utils.system.files import atomic_write, cannot_write, check_writable, locked, sha256

TRIES = 5  # in a row that bring nothing
WAIT_S = 2.0  # before the second try; each wait is twice as long as the one before
TIMEOUT_S = 30.0  # without a byte
BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A public file.

    Attributes:
        url: where it is.
        file: its name on the disk.
        terms: what it may be used for, in a few words.
        sha256: of its bytes, or None where its makers publish none that we know.
    """

    url: str
    file: str
    terms: str
    sha256: str | None = None


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
DATA = {
    "flare22": Source(
        "https://zenodo.org/records/7860267/files/FLARE22Train.zip?download=1",
        "FLARE22Train.zip",
        "CC BY-NC-SA 4.0",
        "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154",
    )
}
WEIGHTS = {  # by the name of the model
    "medsam_vit_b": Source(
        "https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",
        "medsam_vit_b.pth",
        "terms on its page, https://zenodo.org/records/10689643",
    ),
    "sam_vit_b": Source(
        _SAM + "sam_vit_b_01ec64.pth",
        "sam_vit_b_01ec64.pth",
        "Apache-2.0",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "sam_vit_l": Source(
        _SAM + "sam_vit_l_0b3195.pth",
        "sam_vit_l_0b3195.pth",
        "Apache-2.0",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "sam_vit_h": Source(
        _SAM + "sam_vit_h_4b8939.pth",
        "sam_vit_h_4b8939.pth",
        "Apache-2.0",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


# --- Files ---------------------------------------------------------------------------------------
def fetch(source: Source, folder: str | Path) -> Path:
    """The file in `folder`, downloaded if it is not there.

    What came of a download that was interrupted is in <file>.part, and the next goes on from there.

    Raises:
        UserError: it cannot be had, with what to place by hand and where; what came, or is there,
            is another file; no room; or another process is downloading it.
    """
    target = Path(folder) / source.file
    part = target.with_name(source.file + ".part")
    check_writable(folder)
    busy = f"{target}: another process is downloading it; wait for it"
    with locked(target.with_name(f".{source.file}.lock"), busy):
        if target.exists():
            if source.sha256 and sha256(target) != source.sha256:
                raise UserError(
                    f"{target}: is not the file of {source.url} (its SHA-256 is another); remove it"
                )
            return target
        print(f"downloading {source.url} to {target}; {source.terms}")
        failed, most = 0, _size(part)
        while True:
            try:
                _fetch_rest(source, part)
                break
            except (OSError, http.client.HTTPException) as error:
                # More than ever before: what was forgotten and comes again brings nothing.
                failed = 1 if _size(part) > most else failed + 1
                most = max(most, _size(part))
                reason = getattr(error, "reason", None) or error
                # Offline, or not the server that it should be.
                hopeless = isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError))
                hopeless |= getattr(error, "code", 0) in (401, 403, 404, 410)
                if failed == TRIES or hopeless:
                    raise UserError(
                        f"{source.url}: cannot be downloaded ({reason}); go on with the same "
                        f"command later, or get the file another way and put it at {target}"
                    ) from error
                wait = WAIT_S * 2 ** (failed - 1)
                print(f"{reason}; trying again in {wait:g} s")
                time.sleep(wait)
        if source.sha256 and sha256(part) != source.sha256:
            _forget(part)
            raise UserError(
                f"{source.url}: what came is not {source.file} (its SHA-256 is another) and was "
                f"removed; try again, or get the file another way and put it at {target}"
            )
        try:
            os.replace(part, target)
        except OSError as error:
            raise cannot_write(target, error) from error
        _forget(part)
    return target


def _fetch_rest(source: Source, part: Path) -> None:
    """Append to `part` what it lacks, or write it anew where the server has another file by now.

    It is whole afterwards, as far as the server tells how long the file is.

    Raises:
        OSError, http.client.HTTPException: of the connection, or it ended too early.
        UserError: of the disk.
    """
    from tqdm import tqdm

    have, tag = _size(part), _tag_of(part)
    headers = {"User-Agent": "Python", "Accept-Encoding": "identity"}
    if have and tag.is_file():
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text(encoding="utf-8")}
    elif have and source.sha256:  # by which another file would be noticed
        headers |= {"Range": f"bytes={have}-"}
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(source.url, headers=headers), timeout=TIMEOUT_S
        )
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what we have, which is all of it, or another file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            _forget(part)
        raise
    with response:
        resumed = response.status == 206
        if resumed:
            # Content-Length is that of the answer, which may be less than what was asked for.
            given = response.headers.get("Content-Range", "")
            answer = re.fullmatch(rf"bytes {have}-[0-9]+/([0-9]+)", given)
            if not answer:
                _forget(part)
                raise ConnectionError("the server sent another part than was asked for")
            total = int(answer[1])
        else:
            have = 0
            length = response.headers.get("Content-Length")
            total = None if length is None else int(length)
        if not resumed:
            _forget(part)
            # A weak tag does not promise the same bytes.
            known = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if known and not known.startswith("W/"):
                with atomic_write(tag, "w") as file:
                    file.write(known)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, _disk(part), open(part, "ab") as file:
            while block := _received(response):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and _size(part) != total:
            raise ConnectionError(f"the connection ended at {_size(part):,} of {total:,} bytes")


class _Lost(Exception):
    """An error of the connection, kept apart from those of the disk."""


def _received(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _Lost from error


@contextlib.contextmanager
def _disk(path: Path):
    try:
        yield
    except _Lost as lost:
        raise lost.__cause__ from None
    except OSError as error:
        raise cannot_write(path, error) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _forget(part: Path) -> None:
    for path in (part, _tag_of(part)):
        path.unlink(missing_ok=True)


# --- Archives ------------------------------------------------------------------------------------
def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a ZIP archive to `folder`, if that is not there yet; it is whole when it is there.

    Raises:
        UserError: the archive is damaged, a member would leave the folder or is a link, there is
            no room, or another process is unpacking it.
    """
    busy = f"{folder}: another process is unpacking it; wait for it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        if not folder.is_dir():
            _unpack_whole(archive, folder)
    return folder


def _unpack_whole(archive: Path, folder: Path) -> None:
    from tqdm import tqdm

    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
            for member in members:
                _check_member(archive, member)
            aside.mkdir(parents=True)
            for member in tqdm(
                members, unit="file", desc=f"unpacking {archive.name}", disable=None
            ):
                file.extract(member, aside)
        aside.replace(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive}: damaged ({error}); remove it and try again") from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    name = member.orig_filename
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts
    if leaves or any(c in name for c in "\\:\0") or stat.S_ISLNK(member.external_attr >> 16):
        raise UserError(
            f"{archive}: its member {name!r} would leave the folder, or is a link; nothing was "
            "unpacked"
        )
    if member.flag_bits & 1:
        raise UserError(f"{archive}: its member {name!r} is encrypted; nothing was unpacked")
