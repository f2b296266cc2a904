"""Stand-ins for models, for tests of the embedding cache."""

import torch
from torch.nn import functional as F


class CountingEncoder:
    """Its embedding is the mean grey level of 64 x 64 blocks, and it counts the encoded slices."""

    def __init__(self, base_sha256: str = "a", name: str = "lite_medsam") -> None:
        self.name, self.base_sha256, self.calls = name, base_sha256, 0
        self.device, self.image_encoder = torch.device("cpu"), torch.nn.Identity()
        self.input_size, self.embedding_shape = 256, (8, 16, 16)

    def encode(self, images, frames, fp16=False):
        self.calls += len(images)
        return F.avg_pool2d(images.float()[:, None], 64).expand(-1, 8, -1, -1) / 255


class GPU(CountingEncoder):
    """On a GPU; `error` is fp16's relative error."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.device, self.error, self.batches = torch.device("cuda"), error, []

    def encode(self, images, frames, fp16=False):
        self.batches.append(len(images))
        exact = super().encode(images, frames)
        return exact * (1 + self.error) if fp16 else exact
