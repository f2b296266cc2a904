"""The fused attention of SAM's image encoder against segment-anything's own."""

from copy import deepcopy

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from utils.model import attention
from utils.model.attention import FusedAttention, fuse_attention


def encoder(width: int, heads: int) -> ImageEncoderViT:
    """A windowed block, whose windows are padded, and a global one, of random weights."""
    torch.manual_seed(0)
    shape = {"img_size": 320, "depth": 2, "window_size": 14, "global_attn_indexes": (1,)}
    network = ImageEncoderViT(embed_dim=width, num_heads=heads, use_rel_pos=True, **shape)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.05)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16)])  # ViT-B, L, H
@pytest.mark.parametrize("small", [True, False])
def test_embeddings_are_those_of_segment_anything(width, heads, small, monkeypatch):
    theirs = encoder(width, heads)
    ours = deepcopy(theirs)
    fuse_attention(ours)
    assert [type(block.attn) for block in ours.blocks] == [FusedAttention] * 2
    if not small:  # as with 1,024 positions or more: a few heads at a time
        monkeypatch.setattr(attention, "MANY", 0)
        monkeypatch.setattr(attention, "HEADS_ON_CPU", 5)
    images = torch.randn(2, 3, 320, 320)
    expected = theirs(images)
    assert (ours(images) - expected).norm() < 1e-5 * expected.norm()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.blocks[1].attn.rel_pos_w.add_(1.0 * torch.arange(39)[:, None])
    assert (ours(images) - expected).norm() > 1e-3 * expected.norm()
