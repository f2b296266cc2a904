"""Downloads of public files, resumable and verified, and unpacking of archives."""

import http.client
import shutil
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from utils.system import UserError
from utils.system.files import locked, new_folder, sha256

DOWNLOAD = "download"  # in place of a path, for the options that take weights
TIMEOUT_S = 30.0  # without a byte


@dataclass(frozen=True)
class Source:
    """A public file: its address, its licence, and its SHA-256 if its authors publish one."""

    url: str
    terms: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """Its name on the disk: that of the URL, without a query."""
        return self.url.partition("?")[0].rpartition("/")[2]


DATA = {
    "flare22": Source(
        "https://zenodo.org/records/7860267/files/FLARE22Train.zip?download=1",
        "CC BY-NC-SA 4.0",
        "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154",
    )
}
_SAM = "https://dl.fbaipublicfiles.com/segment_anything/"
WEIGHTS = {  # by model name
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
    "medsam_vit_b": Source(
        "https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",
        "terms on its page, https://zenodo.org/records/10689643",
    ),
}


def weights_path(model: str, folder: Path, option: str) -> str:
    """The absolute path at which `fetch` keeps a model's weights; UserError if it needs none."""
    if model not in WEIGHTS:
        raise UserError(f"{option}: download is for {', '.join(WEIGHTS)}; {model} needs none")
    return str((folder / WEIGHTS[model].file).resolve())


def fetch(source: Source, folder: str | Path) -> Path:
    """Download a file to `folder`, unless it is there, check its SHA-256 and return its path.

    An interrupted download stays in <file>.part, and the next call resumes it.

    Raises UserError: it cannot be downloaded (the message says where to put it by hand), its
    SHA-256 differs, or another process is downloading it.
    """
    target = Path(folder) / source.file
    busy = f"{target}: another process is downloading it; wait for it"
    with locked(target.with_name(f".{source.file}.lock"), busy):
        if not target.exists():
            print(f"downloading {source.url} to {target}; {source.terms}")
            part = target.with_name(f"{source.file}.part")
            try:
                _download(source.url, part)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise UserError(
                    f"{source.url}: cannot be downloaded ({reason}); run the same command again to "
                    f"resume, or get the file another way and put it at {target}"
                ) from error
            part.replace(target)
        if source.sha256 and sha256(target) != source.sha256:
            raise UserError(
                f"{target}: not the file at {source.url} (its SHA-256 differs); remove it and try "
                "again, or get the file another way"
            )
    return target


def _download(url: str, part: Path) -> None:
    """Append the missing bytes to `part`, or write it anew if the server sends the whole file."""
    received = part.stat().st_size if part.is_file() else 0
    start = max(0, received - 1)  # the last byte again: servers refuse to send an empty rest
    headers = {"User-Agent": "Python", "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != 206:
            start = 0
        sent = response.headers
        total = int((sent["Content-Range"] or sent["Content-Length"] or "0").rpartition("/")[2])
        bar = tqdm.wrapattr(response, "read", total or None, initial=start, disable=None)
        with bar as body, open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            shutil.copyfileobj(body, file, 1 << 20)
    received = part.stat().st_size
    if total and received != total:
        raise ConnectionError(f"the connection ended at {received:,} of {total:,} bytes")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ZIP archive to `folder`, which appears when it is complete.

    `zipfile` keeps every member within the folder, and writes a link as a plain file.

    Raises UserError: the archive is damaged or encrypted, or as `new_folder`.
    """
    print(f"unpacking {archive}")
    try:
        with new_folder(folder) as partial, zipfile.ZipFile(archive) as file:
            file.extractall(partial)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: damaged ({error}); remove it and try again") from error
