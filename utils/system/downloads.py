"""Downloads of public files, resumable and verified, and unpacking of archives.

With them one command fetches FLARE22 and another MedSAM's weights: gigabytes that must be whole.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.system.errors import UserError
from utils.system.files import DISK_FULL, cannot_write, check_writable, locked, sha256

DOWNLOAD = "download"  # in place of a path, for the options that take weights
TRIES = 5  # in a row without progress
WAIT_S = 2.0  # before the second try; doubled before each further one
TIMEOUT_S = 30.0  # without a byte


@dataclass(frozen=True)
class Source:
    """A public file.

    Attributes:
        url: its address.
        terms: its licence, in a few words.
        sha256: of its bytes, or None where its authors publish none.
    """

    url: str
    terms: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Its name on the disk: that of the URL, without a query."""
        return self.url.partition("?")[0].rpartition("/")[2]


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
DATA = {
    "flare22": Source(
        "https://zenodo.org/records/7860267/files/FLARE22Train.zip?download=1",
        "CC BY-NC-SA 4.0",
        "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154",
    )
}
WEIGHTS = {  # by model name
    "medsam_vit_b": Source(
        "https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",
        "terms on its page, https://zenodo.org/records/10689643",
    ),
    "sam_vit_b": Source(
        _SAM + "sam_vit_b_01ec64.pth",
        "Apache-2.0",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "sam_vit_l": Source(
        _SAM + "sam_vit_l_0b3195.pth",
        "Apache-2.0",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "sam_vit_h": Source(
        _SAM + "sam_vit_h_4b8939.pth",
        "Apache-2.0",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


def weights_path(model: str, folder: Path, option: str) -> str:
    """Where `fetch` keeps the weights of a model: an absolute path in `folder`.

    Raises:
        UserError: the model has none to download; the message begins with `option`.
    """
    if model not in WEIGHTS:
        raise UserError(f"{option}: download is for {', '.join(WEIGHTS)}; {model} needs none")
    return str((folder / WEIGHTS[model].file).resolve())


def fetch(source: Source, folder: str | Path) -> Path:
    """Download a file to `folder`, unless it is there, and return its path.

    An interrupted download stays in <file>.part and is resumed by the next call, since the files
    are gigabytes and connections break.

    Raises:
        UserError: the file cannot be downloaded (the message says where to put it by hand), it has
            another SHA-256, the disk is full, or another process is downloading it.
    """
    target = Path(folder) / source.file
    part = target.with_name(source.file + ".part")
    check_writable(folder)
    busy = f"{target}: another process is downloading it; wait for it"
    with locked(target.with_name(f".{source.file}.lock"), busy):
        if target.exists():
            if source.sha256 and sha256(target) != source.sha256:
                raise UserError(
                    f"{target}: not the file at {source.url} (its SHA-256 differs); remove it"
                )
            return target
        print(f"downloading {source.url} to {target}; {source.terms}")
        failures, largest = 0, _size(part)
        while True:
            try:
                _fetch_rest(source, part)
                break
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in DISK_FULL:
                    raise cannot_write(part, error) from error
                failures = 1 if _size(part) > largest else failures + 1
                largest = max(largest, _size(part))
                reason = getattr(error, "reason", None) or error
                offline = isinstance(reason, (socket.gaierror, ssl.SSLCertVerificationError))
                gone = getattr(error, "code", 0) in (401, 403, 404, 410)
                if failures == TRIES or offline or gone:
                    raise UserError(
                        f"{source.url}: cannot be downloaded ({reason}); run the same "
                        f"command later, or get the file another way and put it at {target}"
                    ) from error
                wait = WAIT_S * 2 ** (failures - 1)
                print(f"{reason}; trying again in {wait:g} s")
                time.sleep(wait)
        if source.sha256 and sha256(part) != source.sha256:
            _discard(part)
            raise UserError(
                f"{source.url}: did not send {source.file} (the SHA-256 differs), and what it sent "
                f"was removed; try again, or get the file another way and put it at {target}"
            )
        part.replace(target)
        _discard(part)
    return target


def _fetch_rest(source: Source, part: Path) -> None:
    """Append the missing bytes to `part`, or start again if the server's file has changed.

    Raises:
        OSError, http.client.HTTPException: the connection failed or ended early, or the disk is
            full.
    """
    received, tag = _size(part), _tag(part)
    headers = {"User-Agent": "Python", "Accept-Encoding": "identity"}
    if received and (tag.is_file() or source.sha256):  # with either, a changed file is noticed
        headers["Range"] = f"bytes={received}-"
        if tag.is_file():
            headers["If-Range"] = tag.read_text(encoding="utf-8")
    request = urllib.request.Request(source.url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no bytes after ours
            if error.headers.get("Content-Range") == f"bytes */{received}":
                return
            _discard(part)
        raise
    with response:
        if response.status == 206:
            answer = response.headers.get("Content-Range", "")
            match = re.fullmatch(rf"bytes {received}-[0-9]+/([0-9]+)", answer)
            if not match:
                _discard(part)
                raise ConnectionError("the server sent another range than requested")
            total = int(match[1])
        else:
            _discard(part)
            total = int(response.headers.get("Content-Length", 0)) or None
            etag = response.headers.get("ETag", "")
            if etag.startswith('"'):  # a weak one, W/"...", does not promise the same bytes
                tag.write_text(etag, encoding="utf-8")
        bar = tqdm(total=total, initial=_size(part), unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab") as file:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total and _size(part) != total:
        raise ConnectionError(f"the connection ended at {_size(part):,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _tag(part: Path) -> Path:
    """The file that holds the ETag of an interrupted download."""
    return part.with_name(part.name + ".tag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a ZIP archive to `folder`, unless that exists; it appears when it is complete.

    `zipfile` keeps every member within the folder: it drops ".." and drives from names and writes
    a link as a plain file.

    Raises:
        UserError: the archive is damaged or encrypted, the disk is full, or another process is
            unpacking it.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    busy = f"{folder}: another process is unpacking it; wait for it"
    with locked(folder.with_name(f".{folder.name}.lock"), busy):
        if folder.is_dir():
            return folder
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with zipfile.ZipFile(archive) as file:
                partial.mkdir(parents=True)
                bar = f"unpacking {archive.name}"
                for member in tqdm(file.infolist(), unit="file", desc=bar, disable=None):
                    file.extract(member, partial)
            partial.replace(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise UserError(f"{archive}: damaged ({error}); remove it and try again") from error
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder
