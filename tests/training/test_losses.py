"""The loss against MONAI's and PyTorch's, and by hand."""

import pytest
import torch
from monai.losses import DiceLoss

from utils.evaluation.scoring import dsc
from utils.training.losses import (
    bce_loss,
    dice_loss,
    dsc_on_device,
    resize_logits,
    segmentation_loss,
)


def sample(soft: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 16, 24, generator=generator)
    targets = torch.rand(3, 16, 24, generator=generator)
    return logits, targets if soft else (targets > 0.7).float()


@pytest.mark.parametrize("soft", [False, True])
def test_losses_are_monais_with_squared_denominators_and_pytorchs(soft):
    """Of each mask its own, BCE as the mean over its pixels."""
    logits, targets = sample(soft)
    smooth = {"smooth_nr": 1e-6, "smooth_dr": 1e-6}
    monai = DiceLoss(sigmoid=True, squared_pred=True, reduction="none", **smooth)
    dice = monai(logits[:, None], targets[:, None]).flatten()
    bce = torch.nn.BCELoss(reduction="none")(logits.sigmoid(), targets).mean(dim=(1, 2))
    assert dice_loss(logits, targets) == pytest.approx(dice, abs=1e-6)
    assert bce_loss(logits, targets) == pytest.approx(bce, abs=1e-4)


def test_loss_by_hand():
    # p = 1/2 on four pixels, one of them target: Dice 1 - 2 (1/2) / (4/4 + 1) = 1/2, BCE ln 2.
    logits, targets = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert segmentation_loss(logits, targets).item() == pytest.approx(0.5 + 0.693147, abs=1e-5)


def test_half_precision_logits_of_a_large_mask_do_not_overflow():
    logits, targets = torch.full((1, 256, 256), 20.0).half(), torch.ones(1, 256, 256)
    loss = segmentation_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0, abs=1e-4)


def test_logits_are_resized_bilinearly_to_the_targets():
    logits = sample(soft=False)[0][:, :16, :16]
    expected = torch.nn.Upsample(64, mode="bilinear")(logits[None])[0]
    assert torch.equal(resize_logits(logits, 64), expected)
    assert resize_logits(logits, 16) is logits


def test_dsc_on_the_device_is_that_of_the_metrics():
    logits, targets = sample(soft=True)
    logits, targets = logits[..., :16], targets[..., :16]
    logits[0] = -1
    masks, target_masks = (logits > 0).numpy(), (targets >= 0.5).numpy()
    expected = [dsc(*pair) for pair in zip(masks, target_masks, strict=True)]
    assert dsc_on_device(logits, targets).tolist() == pytest.approx(expected) and expected[0] == 0
    nothing = torch.zeros(1, 4, 4)
    assert dsc_on_device(nothing - 1, nothing).tolist() == [1.0]
