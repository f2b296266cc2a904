"""Embeddings of the frozen image encoder, computed once per slice and kept on the disk.

    <data>/embeddings/<model>-<hash of its weights>[-fp16]/<hash of the image>.npy

holds one float16 array (C, h, w) per slice; "-fp16" marks what a GPU computed in fp16. A path
identifies its file's inputs, so all runs and data sets may share the files, even concurrently. An
interrupted encoding resumes where it stopped, and a complete cache is only read.
"""

import io
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from utils.data.slices import Slice, read_image
from utils.model.segmenter import Segmenter
from utils.system import UserError, distributed, plural, signals
from utils.system.device import free_gpu_bytes, reading_threads
from utils.system.files import cannot_write
from utils.system.loops import prefetch, progress_bar

TOLERANCE = 0.02  # relative error of fp16 encoding in the L2 norm; above it, fp32 is used
KEPT_SHARE = 0.25  # of a GPU's free memory for embeddings that are used in every epoch
ENCODE_PIXELS = 1024**2  # per encoder call on a GPU: 1 slice of 1024 px, 16 of 256 px


class Embeddings:
    """Embeddings by slice, from the cache or, without one, from the encoder; rounded to float16.

    `load` reads what `embed` needs, and may run ahead in another thread.
    """

    def __init__(
        self,
        model: Segmenter,
        samples: Sequence[Slice],
        cache: bool = True,
        cache_dir: str | Path | None = None,
        keep: bool = False,
    ) -> None:
        """Encode the slices that are not in `cache_dir`, or embeddings/ in each data set's folder.

        Under torchrun each process encodes its shard. Then the image encoder moves to the CPU.
        Without a cache, slices are encoded at every use. `keep` leaves embeddings that are used
        again, as in training, on a GPU, as far as KEPT_SHARE of its free memory goes.

        Raises:
            UserError: the disk is full, the cache cannot be written, or an image changed.
            Interrupted: by a deferred signal; what is encoded is kept.
        """
        self._model, self._cache, self._cache_dir = model, cache, cache_dir
        self._fp16 = model.device.type == "cuda" and self._choose_fp16(samples)
        if cache:
            self._encode_missing(samples)
            model.image_encoder.cpu()
        self._kept: dict[str, torch.Tensor] = {}  # by the key of their slice
        self._room = int(KEPT_SHARE * free_gpu_bytes(model.device)) if keep and cache else 0
        if self._room:
            distributed.print_once(
                f"embeddings stay on the GPU, up to {self._room / 2**30:.1f} GiB"
            )

    def load(self, sample: Slice) -> torch.Tensor:
        """The cached embedding (C, h, w) float16, pinned for a GPU; or the image, uint8.

        Raises a UserError if the cached file is gone or damaged, or the image changed.
        """
        if sample.key in self._kept:
            return self._kept[sample.key]
        if not self._cache:
            return _read_images([sample])[0]
        path = self._path(sample, self._fp16)
        try:
            embedding = torch.from_numpy(np.load(path))
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: cannot read ({error}); run again to re-encode") from error
        return embedding.pin_memory() if self._model.device.type == "cuda" else embedding

    def embed(self, loaded: Sequence[torch.Tensor], samples: Sequence[Slice]) -> torch.Tensor:
        """Embeddings (B, C, h, w) float32 on the model's device, of what `load` returned."""
        model = self._model
        if not self._cache:
            pairs = zip(loaded, samples, strict=True)
            encoded = [model.encode(image[None], [s.frame], self._fp16) for image, s in pairs]
            return torch.cat(encoded).half().float()
        batch = torch.empty(len(loaded), *model.embedding_shape, device=model.device)
        for embedding, row, sample in zip(batch, loaded, samples, strict=True):
            row = row.to(model.device, non_blocking=True)
            embedding.copy_(row)
            if self._room >= row.nbytes and sample.key not in self._kept:
                self._kept[sample.key] = row
                self._room -= row.nbytes
        return batch

    def __call__(self, sample: Slice) -> torch.Tensor:
        """The embedding (C, h, w) float32 of one slice, on the model's device."""
        return self.embed([self.load(sample)], [sample])[0]

    def _path(self, sample: Slice, fp16: bool) -> Path:
        folder = Path(self._cache_dir or sample.folder / "embeddings")
        encoder = f"{self._model.name}-{self._model.base_sha256[:16]}{'-fp16' if fp16 else ''}"
        return folder / encoder / f"{sample.image_sha256}.npy"

    def _choose_fp16(self, samples: Sequence[Slice]) -> bool:
        """Whether to encode in fp16: if some slices were, or if rank 0 finds it close to fp32."""
        folders = {self._path(sample, fp16=True).parent for sample in samples}
        cached = self._cache and any(any(folder.glob("*.npy")) for folder in folders)
        if distributed.broadcast(cached):
            return True
        model, inputs = self._model, (_read_images(samples[:1]), [samples[0].frame])
        fast = model.encode(*inputs, fp16=True).float().cpu()
        model.image_encoder.cpu()
        exact = model.encode(*inputs)
        model.image_encoder.to(model.device)
        error = distributed.broadcast(((fast - exact).norm() / exact.norm()).item())
        if error > TOLERANCE:
            distributed.print_once(f"fp16 encoding would be {error:.1%} off; encoding in fp32")
        return error <= TOLERANCE

    def _encode_missing(self, samples: Sequence[Slice]) -> None:
        whole = _npy(np.zeros(self._model.embedding_shape, np.float16))
        paths = {self._path(sample, self._fp16): sample for sample in samples}
        missing = {path: sample for path, sample in paths.items() if not _is_like(whole, path)}
        missing = distributed.broadcast(missing)  # before any process writes
        if not missing:
            return
        slices = plural(len(missing), "slice")
        size = f"{len(missing) * len(whole) / 2**20:,.0f} MiB"
        place = f"in {self._cache_dir}" if self._cache_dir else "beside the slices"
        distributed.print_once(f"encoding {slices} with {self._model.name}, once: {size} {place}")
        mine = distributed.shard(list(missing))
        encoded = encode_all(self._model, [missing[path] for path in mine], self._fp16)
        with progress_bar(desc="encoding", unit="slice", total=len(mine)) as bar:
            for path, embedding in zip(mine, encoded, strict=True):
                _write(path, _npy(embedding.numpy()))
                bar.update()
                signals.raise_if_pending()
        distributed.barrier()


def encode_all(model: Segmenter, samples: Sequence[Slice], fp16: bool) -> Iterator[torch.Tensor]:
    """Yield the embedding of each slice, (C, h, w) float16 on the CPU; on a GPU made in batches."""
    # On a CPU a larger batch is no faster, and reading ahead would take cores from the encoder.
    size = max(1, ENCODE_PIXELS // model.input_size**2) if model.device.type == "cuda" else 1
    batches = [samples[start : start + size] for start in range(0, len(samples), size)]
    readers = reading_threads(model.device)
    loaded = prefetch(_read_images, batches, readers, readers)
    for batch, images in zip(batches, loaded, strict=True):
        yield from model.encode(images, [sample.frame for sample in batch], fp16).half().cpu()


def _read_images(samples: Sequence[Slice]) -> torch.Tensor:
    """Images (B, 1024, 1024) uint8; a UserError if one is not what dataset.json lists."""
    images = [read_image(sample.image_path, sample.image_sha256) for sample in samples]
    return torch.from_numpy(np.stack(images))


def _npy(embedding: np.ndarray) -> memoryview:
    """The content of a .npy file."""
    content = io.BytesIO()
    np.save(content, embedding)
    return content.getbuffer()


def _is_like(whole: memoryview, path: Path) -> bool:
    """Whether a file is there with the header and the size of `whole`."""
    try:
        with open(path, "rb") as file:
            return file.read(128) == whole[:128] and file.seek(0, io.SEEK_END) == len(whole)
    except OSError:
        return False


def _write(path: Path, content: memoryview) -> None:
    """Write a file atomically, also if another run writes the same one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        elsewhere = "name another folder with --cache-dir, or use --cache off"
        raise UserError(f"{cannot_write(path.parent, error)}; {elsewhere}") from error
