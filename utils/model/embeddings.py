"""Embeddings of the frozen image encoder, computed once per slice and kept on the disk.

Encoding a slice takes longer than training on it (docs/performance.md). With this cache every epoch
and every further run costs the decoder alone, so that a laptop is enough.

`<data>/embeddings/<model>-<key>.bin` has one row per slice of the data set: its fp16 embedding and
the CRC-32 of that, which is zero until the slice is encoded. The key is a hash of what makes the
rows (weights, preprocessing, slices), so they are never used for anything else, and several data
sets may share another folder in place of <data>/embeddings. All runs on the data share the file,
also at the same time: an interrupted encoding is resumed, and a row that a power cut or a disk
damaged is noticed by its CRC and encoded again by the next run. A file that holds all slices of a
run is only read, so that it may lie on a read-only disk. Rows are read one at a time, so memory
does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from utils.data.frame import Frame
from utils.data.slices import Slice, SliceDataset, read_image
from utils.model.segmenter import Segmenter
from utils.system import distributed, signals
from utils.system.device import free_memory, is_out_of_memory, reading_threads
from utils.system.errors import UserError
from utils.system.files import DISK_FULL, cannot_write
from utils.system.prefetch import prefetch
from utils.system.progress_bar import progress_bar

VERSION = 2  # raise it when encoding or normalisation changes
SHAPE = (256, 64, 64)
ROW = np.dtype([("embedding", "<f2", SHAPE), ("crc32", "<u4")])
TOLERANCE = 0.02  # relative error of fp16 encoding in the L2 norm; above it, fp32 is used
SPARSE = sys.platform != "win32"  # a row takes room when it is written, not when the file is made
ELSEWHERE = "name a folder that can be written with --cache-dir, or use --cache off"
ENCODE_PIXELS = 2 * 1024**2  # per encoder call on a GPU: 2 slices of 1024 px, 32 of 256 px


def open_embeddings(
    datasets: Sequence[SliceDataset],
    model: Segmenter,
    slices: Sequence[Slice],
    cache: bool = True,
    cache_dir: str | Path | None = None,
) -> Embeddings:
    """The embeddings of `slices`; those that are not in the cache are computed now.

    With a cache, the image encoder then leaves the GPU's memory to the decoder. Without one, slices
    are encoded at every use: to the same values on a CPU, and on a GPU up to the effect of the
    batch size.

    Args:
        datasets: that the slices are of.
        model: whose image encoder encodes them.
        slices: of which embeddings will be read.
        cache: whether to keep embeddings on the disk.
        cache_dir: folder of the cache of all data sets; None for <data>/embeddings of each.

    Raises:
        UserError: the disk is full, the cache cannot be written, or an image changed.
    """
    precisions, caches = {}, {}
    for dataset in datasets:
        precision = fast_precision(model)
        rows = EmbeddingCache(dataset, model, precision, cache_dir)
        unchecked = precision != "fp32" and not (cache and rows.started)
        if unchecked and not close_to_fp32(model, dataset, precision):
            precision = "fp32"
            rows = EmbeddingCache(dataset, model, precision, cache_dir)
        if cache:
            rows.fill([entry for entry in slices if entry.dataset == dataset.name])
            caches[dataset.name] = rows
        precisions[dataset.name] = precision
    if cache:
        model.image_encoder.cpu()
    return Embeddings(model, precisions, caches)


class Embeddings:
    """Embeddings by slice, from the caches or, if there are none, from the encoder.

    `load` reads what `embed` needs, and may run ahead in another thread.
    """

    def __init__(
        self, model: Segmenter, precisions: dict[str, str], caches: dict[str, EmbeddingCache]
    ) -> None:
        """`precisions` and `caches` are by data set's name."""
        self._model, self._precisions, self._caches = model, precisions, caches
        self._checked: set[str] = set()  # slices whose image had the right hash

    def load(self, entry: Slice) -> torch.Tensor:
        """The cached row (256, 64, 64) float16, pinned for a GPU; or the image, uint8.

        Either is checked for damage when it is read for the first time.
        """
        if not self._caches:
            digest = None if entry.key in self._checked else entry.image_sha256
            image = torch.from_numpy(read_image(entry.image_path, digest))
            self._checked.add(entry.key)
            return image
        row = torch.from_numpy(self._caches[entry.dataset].get(entry))
        return row.pin_memory() if self._model.device.type == "cuda" else row

    def embed(self, loaded: Sequence[torch.Tensor], entries: Sequence[Slice]) -> torch.Tensor:
        """Embeddings (B, 256, 64, 64) float32 on the model's device, of what `load` returned.

        They are rounded to float16 with and without a cache.
        """
        if self._caches:
            device = self._model.device
            batch = torch.empty(len(loaded), *SHAPE, device=device)
            for embedding, row in zip(batch, loaded, strict=True):
                embedding.copy_(row.to(device, non_blocking=True))
            return batch
        embeddings = [
            encode(self._model, [image], [entry.frame], self._precisions[entry.dataset])
            for image, entry in zip(loaded, entries, strict=True)
        ]
        return torch.cat(embeddings).float()

    def __call__(self, entry: Slice) -> torch.Tensor:
        """The embedding (256, 64, 64) of one slice."""
        return self.embed([self.load(entry)], [entry])[0]


class EmbeddingCache:
    """The file of one data set's embeddings by one encoder.

    fp16 keeps 11 bits of each value, a relative error of at most 2^-11 or about 0.05 %.
    """

    def __init__(
        self,
        dataset: SliceDataset,
        model: Segmenter,
        precision: str = "fp32",
        folder: str | Path | None = None,
    ) -> None:
        """`precision` is that of encoding, "fp16" or "fp32"; `folder` is <data>/embeddings."""
        slices = dataset.split("all")
        made_from = {
            "version": VERSION,
            "model": model.name,
            "base_sha256": model.base_sha256,
            "precision": precision,
            "images": [(entry.name, entry.image_sha256, entry.frame.content) for entry in slices],
        }
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        beside_the_slices = dataset.folder / "embeddings"
        self.path = Path(folder or beside_the_slices) / f"{model.name}-{key}.bin"
        # --cache-dir may be a link, but none in the data's folder leads what is written elsewhere.
        self._unlinked = (self.path,) if folder else (beside_the_slices, self.path)
        self._model, self._precision = model, precision
        self._offsets = {entry.name: row * ROW.itemsize for row, entry in enumerate(slices)}
        self._checked: set[str] = set()  # slices whose row had the right CRC

    @property
    def started(self) -> bool:
        """Whether the file holds an embedding."""
        return bool(self._encoded())

    def _encoded(self) -> set[str]:
        """The names of the slices whose row is filled.

        Raises:
            UserError: the file cannot be read.
        """
        names = set()
        try:
            with open(self.path, "rb", buffering=0) as file:
                for name, offset in self._offsets.items():
                    file.seek(offset + ROW.fields["crc32"][1])
                    if any(file.read(4)):
                        names.add(name)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path}: cannot read: {error.strerror or error}") from error
        return names

    def fill(self, slices: Sequence[Slice]) -> None:
        """Encode those of `slices` that are missing, each process its shard.

        Every row is written when it is done, so that an interruption loses one at most. Nothing is
        written if none is missing.

        Raises:
            UserError: the disk is full, the file cannot be read or written, or an image changed.
        """
        if any(path.is_symlink() for path in self._unlinked):
            raise UserError(
                f"{self.path.parent}: a link that leads out of the data's folder is not written "
                "to; remove it, and name the folder that it leads to with --cache-dir"
            )
        encoded = self._encoded()
        names = [entry.name for entry in slices if entry.name not in encoded]
        names = set(distributed.broadcast(names))  # before any process writes
        if not names:
            return
        missing = [entry for entry in slices if entry.name in names]
        mine = distributed.shard(missing)
        unwritten = len(self._offsets) * ROW.itemsize
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check_room(len(missing))
            with open(self.path, "ab") as file:  # creates the file, never empties it
                file.truncate(unwritten)
            unwritten = len(mine) * ROW.itemsize
            with (
                open(self.path, "r+b", buffering=0) as file,
                progress_bar(desc="encoding", unit="slice", total=len(mine)) as bar,
            ):
                for entry, embedding in encode_all(self._model, mine, self._precision):
                    row = np.zeros((), ROW)
                    row["embedding"] = embedding
                    row["crc32"] = zlib.crc32(row["embedding"])
                    content = memoryview(row.tobytes())
                    file.seek(self._offsets[entry.name])
                    while content:
                        written = file.write(content)
                        content = content[written:]
                        unwritten -= written
                    bar.update()
                    signals.raise_if_pending()
        except OSError as error:
            failure = cannot_write(self.path, error, unwritten)
            if error.errno not in DISK_FULL:
                failure = UserError(f"{failure}; {ELSEWHERE}")
            raise failure from error
        distributed.barrier()

    def _check_room(self, count: int) -> None:
        """Announce that `count` slices will be encoded, and refuse if they do not fit the disk."""
        if SPARSE:
            needed = count * ROW.itemsize
        else:
            there = self.path.stat().st_size if self.path.exists() else 0
            needed = max(0, len(self._offsets) * ROW.itemsize - there)
        free = shutil.disk_usage(self.path.parent).free
        distributed.print_once(
            f"encoding {count} slices with {self._model.name}: "
            f"{needed / 2**30:.2f} GiB in {self.path}"
        )
        if needed > free:
            raise UserError(
                f"{self.path}: needs {needed:,} bytes, and {needed - free:,} of them do not fit; "
                "free some space, use fewer slices, a --cache-dir on another disk, or --cache off"
            )

    def get(self, entry: Slice) -> np.ndarray:
        """The embedding (256, 64, 64) float16 of a slice that `fill` was called with.

        Its CRC is checked when it is read for the first time.

        Raises:
            UserError: the row is damaged or missing; it is then marked to be encoded again.
        """
        offset = self._offsets[entry.name]
        try:
            rows = np.fromfile(self.path, ROW, count=1, offset=offset)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot read slice {entry.name}: {error.strerror or error}; "
                "remove this file"
            ) from error
        if len(rows) and (
            entry.name in self._checked or zlib.crc32(rows["embedding"]) == rows["crc32"][0]
        ):
            self._checked.add(entry.name)
            return rows["embedding"][0]
        damaged = f"{self.path}: was damaged at slice {entry.name}"
        try:
            with open(self.path, "r+b") as file:
                file.seek(offset + ROW.fields["crc32"][1])
                file.write(bytes(4))
        except OSError as error:
            raise UserError(
                f"{damaged}, and cannot be written ({error.strerror or error}); {ELSEWHERE}"
            ) from error
        raise UserError(
            f"{damaged}, which the next run encodes again; run the same command again, a training "
            "run with --resume"
        )


# --- Encoding ------------------------------------------------------------------------------------
def checked_image(entry: Slice) -> torch.Tensor:
    """A slice's image, uint8 (1024, 1024); a UserError if it is not the one in dataset.json."""
    return torch.from_numpy(read_image(entry.image_path, entry.image_sha256))


def encode(
    model: Segmenter, images: Sequence[torch.Tensor], frames: Sequence[Frame], precision: str
) -> torch.Tensor:
    """Embeddings (B, 256, 64, 64) float16 of slices, computed in "fp16" or "fp32".

    Args:
        model: whose image encoder encodes them.
        images: uint8 (1024, 1024) each.
        frames: how the slices lie in them.
        precision: of the computation.
    """
    with torch.autocast(model.device.type, torch.float16, enabled=precision == "fp16"):
        return model.encode(torch.stack(list(images)), frames).half()


def encode_all(
    model: Segmenter, entries: Sequence[Slice], precision: str
) -> Iterator[tuple[Slice, torch.Tensor]]:
    """Encode slices in batches that fit the GPU's memory; images are read ahead in other threads.

    Yields:
        Every slice, in order, with its embedding (256, 64, 64) float16 on the CPU.
    """
    on_gpu = model.device.type == "cuda"
    # On a CPU a larger batch is no faster, and reading ahead would take cores from the encoder.
    size = max(1, ENCODE_PIXELS // model.input_size**2) if on_gpu else 1
    ahead = size if on_gpu else 0
    images = prefetch(checked_image, entries, ahead, reading_threads(model.device) or 1)
    loaded: list[torch.Tensor] = []
    done = 0
    while done < len(entries):
        batch = entries[done : done + size]
        loaded += islice(images, max(0, len(batch) - len(loaded)))
        try:
            embeddings = encode(model, loaded[:size], [e.frame for e in batch], precision)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            embeddings = None
        if embeddings is None:  # outside the handler, nothing holds the failed call's tensors
            size //= 2
            free_memory(model.device)
            continue
        yield from zip(batch, embeddings.cpu(), strict=True)
        done += len(batch)
        del loaded[: len(batch)]


def fast_precision(model: Segmenter) -> str:
    """The fastest precision of encoding worth trying: "fp16" on a GPU, "fp32" on a CPU.

    bfloat16, which is faster on some CPUs, is 9 % off for LiteMedSAM.
    """
    return "fp16" if model.device.type == "cuda" else "fp32"


def close_to_fp32(model: Segmenter, dataset: SliceDataset, precision: str) -> bool:
    """Whether `precision` is within TOLERANCE of fp32 on the data set's first slice.

    Where the GPU's memory holds the slice in `precision` alone, the CPU encodes it in fp32.
    """
    entry = dataset.split("all")[0]
    image = checked_image(entry)
    fast = encode(model, [image], [entry.frame], precision).float().cpu()
    try:
        exact = encode(model, [image], [entry.frame], "fp32").float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        exact = None
    if exact is None:  # outside the handler, nothing holds the failed call's tensors
        distributed.print_once(
            f"fp32 encoding does not fit the GPU's memory: {precision} is compared with the CPU's"
        )
        free_memory(model.device)
        model.image_encoder.cpu()
        exact = encode(model, [image], [entry.frame], "fp32").float()
        model.image_encoder.to(model.device)
    error = distributed.broadcast(((fast - exact).norm() / exact.norm()).item())
    if error > TOLERANCE:
        distributed.print_once(
            f"{dataset.folder}: {precision} embeddings would be {error:.1%} off; encoding in fp32"
        )
    return error <= TOLERANCE
