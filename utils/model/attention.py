"""SAM's image encoder with PyTorch's fused attention: the same function of the same weights."""

import torch
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from torch import nn
from torch.nn import functional as F

MANY = 1024  # positions, from which on a CPU the bias of all heads would take too much memory
HEADS_ON_CPU = 1  # at once then: of 4,096 positions the bias of a head takes 64 MiB


class FusedAttention(Attention):
    """segment-anything's attention, whose weights over all positions are never written to memory.

    Its decomposed relative positions are a bias of the fused kernel.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Windows or images (B, H, W, C) to the same shape."""
        batch, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H W, C / heads)
        rows = get_rel_pos(height, height, self.rel_pos_h)
        columns = get_rel_pos(width, width, self.rel_pos_w)
        grid = queries.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, rows)
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, columns)
        step = self.num_heads if x.is_cuda or height * width < MANY else HEADS_ON_CPU
        mixed = []
        for start in range(0, self.num_heads, step):
            heads = slice(start, start + step)
            bias = by_row[:, heads, ..., None] + by_column[:, heads, ..., None, :]
            bias = bias.flatten(4).flatten(2, 3)  # (B, heads, H W, H W)
            of_heads = (each[:, heads] for each in (queries, keys, values))
            mixed.append(F.scaled_dot_product_attention(*of_heads, attn_mask=bias))
        joined = torch.cat(mixed, dim=1).transpose(1, 2)
        return self.proj(joined.reshape(batch, height, width, -1))


def fuse_attention(encoder: nn.Module) -> None:
    """Replace segment-anything's attention, where a network has it, in place."""
    for module in encoder.modules():
        if type(module) is Attention and module.use_rel_pos:
            module.__class__ = FusedAttention
