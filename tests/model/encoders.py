"""Stand-ins for models, for tests of the embedding cache."""

import torch
from torch.nn import functional as F


class CountingEncoder:
    """Its embedding is the mean grey level of 16 x 16 blocks, and it counts the encoded slices."""

    def __init__(self, base_sha256: str) -> None:
        self.name, self.base_sha256, self.calls = "lite_medsam", base_sha256, 0
        self.device, self.image_encoder = torch.device("cpu"), torch.nn.Identity()

    def encode(self, images, frames):
        self.calls += len(images)
        return F.avg_pool2d(images.float()[:, None], 16).expand(-1, 256, -1, -1) / 255


class SmallGPU(CountingEncoder):
    """A GPU that holds two slices at once; `error` is fp16's relative error."""

    def __init__(self, base_sha256: str, error: float = 0.001) -> None:
        super().__init__(base_sha256)
        self.device, self.input_size, self.error = torch.device("cuda"), 256, error
        self.batches = []

    def encode(self, images, frames):
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.batches.append(len(images))
        exact = super().encode(images, frames)
        return exact * (1 + self.error) if torch.is_autocast_enabled("cuda") else exact
