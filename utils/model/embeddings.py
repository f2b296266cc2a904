"""Embeddings of the frozen image encoder: computed once a slice, kept beside the slices.

`<data>/embeddings/<model>-<key>.bin` has a row for every slice of the data set: the fp16 embedding
and its CRC-32, which is zero as long as the slice has not been encoded. The key is a hash of what
made the rows (weights, preprocessing, slices), so that they are never used for anything else. A row
is written whole or noticed as damaged, and then encoded again by the next run: all runs on the data
share the file, also at the same time, and an interrupted encoding goes on where it was. Rows are
mapped into memory one at a time, so that the memory in use does not depend on how many there are.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from utils.data.slices import Slice, SliceDataset, read_image
from utils.model.segmenter import Segmenter
from utils.system import distributed, signals
from utils.system.device import free_memory, is_out_of_memory
from utils.system.errors import UserError
from utils.system.files import cannot_write
from utils.system.prefetch import prefetch

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 2  # raise it when encoding or normalisation changes
SHAPE = (256, 64, 64)
ROW = np.dtype([("embedding", "<f2", SHAPE), ("crc32", "<u4")])
TOLERANCE = 0.02  # of a faster number format, relative to fp32, in the L2 norm
ENCODE_PIXELS = 2 * 1024**2  # in one encoder call on a GPU: 2 slices of 1024 px, 32 of 256 px


class Embeddings(ABC):
    """Where embeddings come from."""

    @abstractmethod
    def load(self, entry: Slice) -> torch.Tensor:
        """What `embed` needs of a slice, on the CPU; may be called in another thread."""

    @abstractmethod
    def embed(self, loaded: Sequence[torch.Tensor], entries: Sequence[Slice]) -> torch.Tensor:
        """Embeddings (B, 256, 64, 64) float32 on the model's device of what `load` gave."""

    def __call__(self, entry: Slice) -> torch.Tensor:
        """The embedding (256, 64, 64) of one slice."""
        return self.embed([self.load(entry)], [entry])[0]


def open_embeddings(
    datasets: Sequence[SliceDataset], model: Segmenter, slices: Sequence[Slice], cache: bool = True
) -> Embeddings:
    """The embeddings of `slices`; those that are not in the cache yet are computed now.

    With a cache the image encoder has done its work then and leaves the GPU's memory to the
    decoder. Without one every slice is encoded each time it is asked for: on a CPU to the same
    values, on a GPU up to what a batch's size changes in them.

    Raises:
        UserError: no room on the disk, the file cannot be written, or an image changed.
    """
    if not cache:
        return LiveEmbeddings(datasets, model)
    opened = CachedEmbeddings(datasets, model, slices)
    model.image_encoder.cpu()
    return opened


class CachedEmbeddings(Embeddings):
    """Embeddings from the files beside the slices."""

    def __init__(
        self, datasets: Sequence[SliceDataset], model: Segmenter, slices: Sequence[Slice]
    ) -> None:
        self._device = model.device
        self._caches = {}
        for dataset in datasets:
            cache = EmbeddingCache(dataset, model, fast_format(model))
            if cache.fmt and not cache.started and not close_to_fp32(model, dataset, cache.fmt):
                cache = EmbeddingCache(dataset, model, None)
            cache.fill([entry for entry in slices if entry.dataset == dataset.name])
            self._caches[dataset.name] = cache

    def load(self, entry: Slice) -> torch.Tensor:
        """The slice's row, float16; page-locked where a GPU copies it."""
        row = torch.from_numpy(self._caches[entry.dataset].get(entry))
        return row.pin_memory() if self._device.type == "cuda" else row

    def embed(self, loaded: Sequence[torch.Tensor], entries: Sequence[Slice]) -> torch.Tensor:
        """The rows on the device, float32."""
        rows = [row.to(self._device, non_blocking=True) for row in loaded]
        return torch.stack(rows).float()


class LiveEmbeddings(Embeddings):
    """Embeddings that are computed whenever they are asked for."""

    def __init__(self, datasets: Sequence[SliceDataset], model: Segmenter) -> None:
        self._model = model
        fast = fast_format(model)
        self._formats = {
            dataset.name: fast if fast and close_to_fp32(model, dataset, fast) else None
            for dataset in datasets
        }

    def load(self, entry: Slice) -> torch.Tensor:
        """The slice's image, uint8."""
        return checked_image(entry)

    def embed(self, loaded: Sequence[torch.Tensor], entries: Sequence[Slice]) -> torch.Tensor:
        """The images' embeddings, rounded to float16 as in the cache."""
        found = [
            encode(self._model, [image], [entry], self._formats[entry.dataset])
            for image, entry in zip(loaded, entries, strict=True)
        ]
        return torch.cat(found).float()


class EmbeddingCache:
    """The file of one data set's embeddings under one encoder.

    fp16 keeps 11 bits of each value: a relative error of at most 2^-11, about 0.05 %.

    Attributes:
        fmt: the number format of encoding, "fp16" or None for fp32.
    """

    def __init__(self, dataset: SliceDataset, model: Segmenter, fmt: str | None = None) -> None:
        slices = dataset.split("all")
        self.fmt = fmt
        made_from = {
            "version": VERSION,
            "model": model.name,
            "base_sha256": model.base_sha256,
            "precision": fmt or "fp32",
            "images": [(entry.name, entry.image_sha256, entry.frame.content) for entry in slices],
        }
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        self._path = dataset.folder / "embeddings" / f"{model.name}-{key}.bin"
        self._model = model
        self._row = {entry.name: row for row, entry in enumerate(slices)}

    @property
    def started(self) -> bool:
        """Whether a row has been encoded already."""
        try:
            return bool(self._encoded().any())
        except OSError:  # not there: `fill` makes it
            return False

    def _encoded(self) -> np.ndarray:
        """Which rows hold an embedding."""
        encoded = np.zeros(len(self._row), bool)
        with open(self._path, "rb", buffering=0) as file:  # a map would bring in whole rows
            for row in range(len(encoded)):
                file.seek((row + 1) * ROW.itemsize - 4)
                encoded[row] = any(file.read(4))
        return encoded

    def fill(self, slices: Sequence[Slice]) -> None:
        """Encode those of `slices` that are not in the cache yet, each rank its share.

        Raises:
            UserError: no room on the disk, or the file cannot be written.
        """
        size = len(self._row) * ROW.itemsize
        folder = self._path.parent
        if folder.is_symlink() or self._path.is_symlink():
            raise UserError(
                f"{folder}: a link that leads out of the data's folder is not written to; remove "
                "it, or link the data's folder as a whole"
            )
        try:
            folder.mkdir(exist_ok=True)
            with open(self._path, "ab") as file:  # "a": makes the file, never empties it
                file.truncate(size)  # sparse: a row takes room when it is written
            distributed.barrier()
            encoded = self._encoded()
            missing = [entry for entry in slices if not encoded[self._row[entry.name]]]
            distributed.barrier()  # all have the same list before the first one writes
            if missing:
                self._check_room(missing)
                self._encode(distributed.shard(missing))
        except OSError as error:
            there = self._path.stat().st_size if self._path.exists() else 0
            raise cannot_write(self._path, error, size - there) from error
        distributed.barrier()

    def get(self, entry: Slice) -> np.ndarray:
        """The embedding (256, 64, 64) float16 of a slice that `fill` was called with.

        Raises:
            UserError: the row was damaged on the disk, or is gone.
        """
        try:
            offset = self._row[entry.name] * ROW.itemsize
            row = np.memmap(self._path, ROW, "r", offset, shape=(1,))[0]
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot read: {error}") from error
        embedding = np.array(row["embedding"])  # the mapping ends with this call
        if zlib.crc32(embedding) != row["crc32"]:
            self._forget(entry)
            raise UserError(
                f"{self._path}: was damaged at slice {entry.name}, which the next run encodes "
                "again; run the same again, a training run with --resume"
            )
        return embedding

    def _forget(self, entry: Slice) -> None:
        """Let a row be encoded again."""
        try:
            with open(self._path, "r+b") as file:
                file.seek((self._row[entry.name] + 1) * ROW.itemsize - 4)
                file.write(bytes(4))
        except OSError as error:
            raise UserError(f"{self._path}: damaged at {entry.name}; remove this file") from error

    def _check_room(self, missing: list[Slice]) -> None:
        needed, free = len(missing) * ROW.itemsize, shutil.disk_usage(self._path.parent).free
        distributed.print_once(
            f"encoding {len(missing)} slices with {self._model.name}: "
            f"{needed / 2**30:.2f} GiB in {self._path}"
        )
        if needed > free:
            raise UserError(
                f"{self._path}: needs {needed:,} bytes, and {needed - free:,} of them find no "
                "room; free some, use fewer slices, or --cache off"
            )

    def _encode(self, missing: Sequence[Slice]) -> None:
        """Encode slices; what is done is kept when this is interrupted.

        Raises:
            UserError: no room on the disk.
        """
        left = len(missing) * ROW.itemsize
        # Written by file, not through the memory map: a full disk is an error there, not a crash.
        with (
            open(self._path, "r+b", buffering=0) as file,
            tqdm(
                total=len(missing),
                unit="slice",
                desc="encoding",
                disable=None if distributed.rank() == 0 else True,
            ) as progress,
        ):
            for entries, embeddings in encode_all(self._model, missing, self.fmt):
                for entry, embedding in zip(entries, embeddings.cpu().numpy(), strict=True):
                    row = np.zeros((), ROW)
                    row["embedding"] = embedding
                    row["crc32"] = zlib.crc32(row["embedding"])
                    file.seek(self._row[entry.name] * ROW.itemsize)
                    content = memoryview(row.tobytes())
                    while content:
                        try:
                            written = file.write(content)
                        except OSError as error:
                            raise cannot_write(self._path, error, left) from error
                        content = content[written:]
                        left -= written
                progress.update(len(entries))
                signals.raise_if_pending()


# --- Encoding ------------------------------------------------------------------------------------
def checked_image(entry: Slice) -> torch.Tensor:
    """A slice's image, uint8 (1024, 1024).

    Raises:
        UserError: it is not the one that dataset.json lists.
    """
    return torch.from_numpy(read_image(entry.image_path, entry.image_sha256))


def encode(
    model: Segmenter, images: Sequence[torch.Tensor], entries: Sequence[Slice], fmt: str | None
) -> torch.Tensor:
    """Embeddings (B, 256, 64, 64) float16 of slices; `fmt` is "fp16" or None for fp32."""
    with torch.autocast(model.device.type, torch.float16, enabled=fmt == "fp16"):
        return model.encode(torch.stack(list(images)), [entry.frame for entry in entries]).half()


def encode_all(
    model: Segmenter, entries: Sequence[Slice], fmt: str | None
) -> Iterator[tuple[Sequence[Slice], torch.Tensor]]:
    """Encode slices in batches that the memory holds; images are read ahead in another thread.

    Yields:
        Some slices, in order, and their embeddings as `encode` gives them.
    """
    on_gpu = model.device.type == "cuda"
    # On a CPU a larger batch is no faster, and reading ahead would take cores from the encoder.
    most = max(1, ENCODE_PIXELS // model.input_size**2) if on_gpu else 1
    waiting: list[tuple[Slice, torch.Tensor]] = []
    images = zip(entries, prefetch(checked_image, entries, most if on_gpu else 0), strict=True)
    while True:
        waiting += islice(images, max(0, most - len(waiting)))
        if not waiting:
            return
        batch = waiting[:most]
        try:
            found = encode(model, [image for _, image in batch], [entry for entry, _ in batch], fmt)
        except (RuntimeError, MemoryError) as error:
            if most == 1 or not is_out_of_memory(error):
                raise
            found = None
        if found is None:  # only now nothing holds the failed call's tensors any more
            most //= 2
            free_memory(model.device)
            continue
        yield [entry for entry, _ in batch], found
        waiting = waiting[most:]


def fast_format(model: Segmenter) -> str | None:
    """The fastest number format that may do: "fp16" on a GPU; on a CPU None, which is fp32.

    bfloat16, which some CPUs are faster in, is 9 % off for LiteMedSAM.
    """
    return "fp16" if model.device.type == "cuda" else None


def close_to_fp32(model: Segmenter, dataset: SliceDataset, fmt: str) -> bool:
    """Whether `fmt` is within TOLERANCE of fp32 on the data set's first slice; says if not."""
    entry = dataset.split("all")[0]
    image = checked_image(entry)
    exact, fast = (encode(model, [image], [entry], each).float() for each in (None, fmt))
    error = distributed.broadcast(((fast - exact).norm() / exact.norm()).item())
    if error > TOLERANCE:
        distributed.print_once(
            f"{dataset.folder}: {fmt} embeddings would be {error:.1%} off; encoding in fp32"
        )
    return error <= TOLERANCE
