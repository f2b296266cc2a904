"""Embeddings of the frozen image encoder: computed once a slice, kept beside the slices.

`<data>/embeddings/<model>-<key>.bin` has a row for every slice of the data set: the fp16 embedding
and its CRC-32, which is zero as long as the slice has not been encoded. The key is a hash of what
made the rows (weights, preprocessing, slices), so that they are never used for anything else. A row
is written whole or noticed as damaged: all runs on the data share the file, also at the same time,
and an interrupted encoding goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from utils.cli import UserError
from utils.files import sha256
from utils.models import Segmenter
from utils.slices import Slice, SliceDataset, read_image

VERSION = 1  # raise it when encoding or normalisation changes
SHAPE = (256, 64, 64)
ROW = np.dtype([("embedding", "<f2", SHAPE), ("crc32", "<u4")])


class EmbeddingCache:
    """Embeddings of one data set under one encoder.

    fp16 keeps 11 bits of each value: a relative error of at most 2^-11, about 0.05 %.
    """

    def __init__(self, dataset: SliceDataset, model: Segmenter) -> None:
        slices = dataset.split("all")
        made_from = {
            "version": VERSION,
            "model": model.name,
            "base_sha256": model.base_sha256,
            "precision": "fp16" if model.device.type == "cuda" else "fp32",
            "images": [(entry.name, entry.image_sha256) for entry in slices],
        }
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        self._path = dataset.folder / "embeddings" / f"{model.name}-{key}.bin"
        self._model = model
        self._row = {entry.name: row for row, entry in enumerate(slices)}
        self._rows: np.ndarray | None = None

    def fill(self, slices: Sequence[Slice]) -> None:
        """Encode those of `slices` that are not in the cache yet.

        Raises:
            UserError: no room on the disk, or the file cannot be written.
        """
        size = len(self._row) * ROW.itemsize
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "ab") as file:  # "a": makes the file, never empties it
                file.truncate(size)  # sparse: a row takes room when it is written
            self._rows = np.memmap(self._path, ROW, "r", shape=(len(self._row),))
            missing = [e for e in slices if not self._rows["crc32"][self._row[e.name]]]
            if missing:
                self._encode(missing)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror or error}") from error

    def get(self, entry: Slice) -> torch.Tensor:
        """The embedding (256, 64, 64) float32 of a slice that `fill` was called with.

        Raises:
            UserError: the row was damaged on the disk.
        """
        row = self._rows[self._row[entry.name]]
        if zlib.crc32(row["embedding"]) != row["crc32"]:
            raise UserError(f"{self._path}: damaged at slice {entry.name}; remove this file")
        return torch.from_numpy(row["embedding"].astype(np.float32))

    def _encode(self, missing: list[Slice]) -> None:
        needed, free = len(missing) * ROW.itemsize, shutil.disk_usage(self._path.parent).free
        print(
            f"encoding {len(missing)} slices with {self._model.name}: "
            f"{needed / 2**30:.2f} GiB in {self._path}"
        )
        if needed > free:
            raise UserError(
                f"{self._path}: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                "make room or use fewer slices"
            )
        half = torch.autocast("cuda", torch.float16, enabled=self._model.device.type == "cuda")
        # Written by file, not through the memory map: a full disk is an error there, not a crash.
        with open(self._path, "r+b") as file:
            for entry in tqdm(missing, unit="slice", desc="encoding", disable=None):
                if sha256(entry.image_path) != entry.image_sha256:
                    raise UserError(f"{entry.image_path}: changed or damaged; preprocess again")
                image = torch.from_numpy(read_image(entry.image_path))[None]
                with half:
                    embedding = self._model.encode(image, [entry.frame])[0]
                row = np.zeros((), ROW)
                row["embedding"] = embedding.half().cpu().numpy()
                row["crc32"] = zlib.crc32(row["embedding"])
                file.seek(self._row[entry.name] * ROW.itemsize)
                file.write(row.tobytes())
                file.flush()


def cached_embeddings(
    datasets: Sequence[SliceDataset], model: Segmenter, slices: Sequence[Slice]
) -> Callable[[Slice], torch.Tensor]:
    """A function from each of `slices` to its embedding (256, 64, 64); all are computed by now.

    The image encoder has done its work then and leaves the GPU's memory to the decoder.
    """
    caches = {dataset.name: EmbeddingCache(dataset, model) for dataset in datasets}
    for name, cache in caches.items():
        cache.fill([entry for entry in slices if entry.dataset == name])
    model.image_encoder.cpu()
    return lambda entry: caches[entry.dataset].get(entry)
