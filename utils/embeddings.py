"""Embeddings of the frozen image encoder: computed once a slice, kept beside the slices.

`<data>/embeddings/<model>-<weights>/` holds one memory-mapped fp16 file with a row for every slice
of the data set, and which rows are filled. All runs on the data share it; it knows which weights,
preprocessing and slices made it and is never used for others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from utils.cli import UserError
from utils.files import atomic_write
from utils.models import Segmenter
from utils.slices import Slice, SliceDataset, read_image

VERSION = 1  # raise it when encoding or normalisation changes
SHAPE = (256, 64, 64)
SAVE_EVERY = 16  # slices encoded between two notes of progress


class EmbeddingCache:
    """Embeddings of one data set under one encoder.

    fp16 keeps 11 bits of each value: a relative error of at most 2^-11, about 0.05 %.
    """

    def __init__(self, dataset: SliceDataset, model: Segmenter) -> None:
        self._row = {entry.name: row for row, entry in enumerate(dataset.split("all"))}
        images = [(entry.name, entry.image_sha256) for entry in dataset.split("all")]
        made_from = {
            "version": VERSION,
            "model": model.name,
            "base_sha256": model.base_sha256,
            "images": images,
        }
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        folder = dataset.folder / "embeddings" / f"{model.name}-{key[:16]}"
        self._model = model
        self._array_path = folder / "embeddings.npy"
        self._filled_path = folder / "filled.npy"
        self._filled = np.zeros(len(images), bool)
        if self._filled_path.is_file() and self._array_path.is_file():
            self._filled = np.load(self._filled_path, allow_pickle=False)
        self._array: np.ndarray | None = None

    def fill(self, slices: Sequence[Slice]) -> None:
        """Encode those of `slices` that are not in the cache yet.

        Raises:
            UserError: no room on the disk, or the folder cannot be written.
        """
        if not slices:
            return
        missing = [entry for entry in slices if not self._filled[self._row[entry.name]]]
        try:
            if missing:
                self._encode(missing)
            self._array = np.load(self._array_path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(f"{self._array_path}: {error.strerror or error}") from error
        if self._array.shape != (len(self._filled), *SHAPE):
            raise UserError(f"{self._array_path}: damaged; remove {self._array_path.parent}")

    def get(self, entry: Slice) -> torch.Tensor:
        """The embedding (256, 64, 64) float32 of a slice that `fill` was called with."""
        return torch.from_numpy(self._array[self._row[entry.name]].astype(np.float32))

    def _encode(self, missing: list[Slice]) -> None:
        folder = self._array_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        needed = len(missing) * 2 * int(np.prod(SHAPE))
        free = shutil.disk_usage(folder).free
        print(
            f"encoding {len(missing)} slices with {self._model.name}: "
            f"{needed / 2**30:.2f} GiB in {folder}"
        )
        if needed > free:
            raise UserError(
                f"{folder}: the embeddings need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
                "are free; make room or use fewer slices"
            )
        mode = "r+" if self._filled.any() else "w+"
        array = np.lib.format.open_memmap(
            self._array_path, mode, dtype=np.float16, shape=(len(self._filled), *SHAPE)
        )
        use_fp16 = self._model.device.type == "cuda"
        pending: list[int] = []
        for entry in tqdm(missing, unit="slice", desc="encoding", disable=None):
            image = torch.from_numpy(read_image(entry.image_path))[None]
            with torch.autocast("cuda", torch.float16, enabled=use_fp16):
                embedding = self._model.encode(image, [entry.frame])[0]
            row = self._row[entry.name]
            array[row] = embedding.half().cpu().numpy()
            pending.append(row)
            if len(pending) == SAVE_EVERY or entry is missing[-1]:
                array.flush()
                self._filled[pending] = True
                with atomic_write(self._filled_path) as file:
                    np.save(file, self._filled)
                pending.clear()


def cached_embeddings(
    datasets: Sequence[SliceDataset], model: Segmenter, slices: Sequence[Slice]
) -> Callable[[Slice], torch.Tensor]:
    """A function from each of `slices` to its embedding (256, 64, 64); all are computed by now."""
    caches = {dataset.name: EmbeddingCache(dataset, model) for dataset in datasets}
    for name, cache in caches.items():
        cache.fill([entry for entry in slices if entry.dataset == name])
    return lambda entry: caches[entry.dataset].get(entry)
