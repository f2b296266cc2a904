"""The training loss, equations (9)-(11), and the DSC that validation follows."""

import torch
from torch.nn import functional as F

EPSILON = 1e-6  # avoids 0 / 0; targets are never empty


def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy (9), the mean over the pixels of each mask: (K,) for (K, H, W)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=(1, 2))


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Soft Dice loss (10) with squared denominators: (K,) for (K, H, W).

    1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) with p = sigmoid(logits). It is 0 where p = g, also for
    targets between 0 and 1 (pixels that the target covers in part).
    """
    p = logits.sigmoid()
    overlap = (p * targets).sum(dim=(1, 2))
    size = p.square().sum(dim=(1, 2)) + targets.square().sum(dim=(1, 2))
    return 1 - (2 * overlap + EPSILON) / (size + EPSILON)


def segmentation_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """BCE + Dice (11) of each mask, (K,) float32.

    The penalty of (12) is AdamW's weight decay. The sums over a mask overflow fp16, so the loss is
    computed in fp32 whatever the autocast. Logits (K, h, w) are resized bilinearly to the
    resolution of the targets (K, s, s), 0 to 1, as MedSAM does.
    """
    logits = resize_logits(logits.float(), targets.shape[-1])
    targets = targets.float()
    return bce_loss(logits, targets) + dice_loss(logits, targets)


def resize_logits(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Mask logits (K, h, w) at another resolution (K, size, size), bilinear."""
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


def dsc_on_device(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """DSC (13) of each mask, (K,), with logits cut at 0 and targets at one half.

    Arguments are those of `segmentation_loss`; both masks empty give 1. Validation uses it because
    it does not wait for a GPU; reports use utils.evaluation.scoring.
    """
    logits = resize_logits(logits.float(), targets.shape[-1])
    masks, target_masks = (logits > 0).flatten(1), (targets >= 0.5).flatten(1)
    size = masks.sum(dim=1) + target_masks.sum(dim=1)
    overlap = (masks & target_masks).sum(dim=1)
    return torch.where(size > 0, 2 * overlap / size.clamp(min=1), 1.0)
