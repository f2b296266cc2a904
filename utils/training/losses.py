"""The training loss, equations (9)-(11)."""

import torch
from torch.nn import functional as F

EPSILON = 1e-6  # keeps 0 / 0 away; targets are never empty


def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy (9), mean over the pixels of each mask: (K,) of two (K, H, W)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice loss (10) with squared denominators: (K,) of two (K, H, W).

    1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) with p = sigmoid(logits). It is 0 where p = g, also for
    targets between 0 and 1 (a pixel that the target covers in part).
    """
    p = logits.sigmoid()
    overlap = (p * targets).sum(dim=(1, 2))
    size = p.square().sum(dim=(1, 2)) + targets.square().sum(dim=(1, 2))
    return 1 - (2 * overlap + EPSILON) / (size + EPSILON)


def segmentation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """BCE + Dice (11) of each mask: (K,) float32 of logits and targets (K, H, W).

    The penalty of (12) is not here: it is AdamW's weight decay. Computed in fp32 under autocast,
    since sums over 256 x 256 pixels overflow fp16.
    """
    logits, targets = logits.float(), targets.float()
    return bce_loss(logits, targets) + dice_loss(logits, targets)


def resize_logits(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Mask logits (K, H, W) at another resolution (K, size, size), bilinear, as MedSAM does."""
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
