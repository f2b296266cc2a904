"""SAM's weights under the names that Hugging Face's transformers gives them, and back."""

from __future__ import annotations

import re

import torch

SHARED = "shared_image_embedding.positional_embedding"  # a second copy of the prompt encoder's
POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
# Beginnings of names, SAM's and transformers', the more special ones first.
BEGINNINGS = (
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.", "vision_encoder."),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", POSITIONS),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
)
LAYERS = (("layers.0", "proj_in"), ("layers.1", "layers.0"), ("layers.2", "proj_out"))
HEAD = re.compile(
    r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d|iou_prediction_head))\.(layers\.\d|proj_\w+)"
)


def to_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SAM's state dict with transformers' names."""
    renamed = {_renamed(name, 0): value for name, value in weights.items()}
    return renamed | {SHARED: renamed[POSITIONS].clone()}


def from_transformers(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' state dict with SAM's names."""
    return {_renamed(name, 1): value for name, value in weights.items() if name != SHARED}


def are_transformers(weights: dict) -> bool:
    """Whether names are those of transformers."""
    return any(isinstance(name, str) and name.startswith("vision_encoder.") for name in weights)


def _renamed(name: str, source: int) -> str:
    """A name of SAM's (`source` 0) as transformers has it, or one of transformers' (1) as SAM."""
    for pair in BEGINNINGS:
        if name.startswith(pair[source]):
            name = pair[1 - source] + name.removeprefix(pair[source])
            break
    if head := HEAD.match(name):
        layers = {pair[source]: pair[1 - source] for pair in LAYERS}
        return f"{head[1]}.{layers[head[2]]}{name[head.end() :]}"
    if "mask_embed" in name or ".neck." in name or "mask_downscaling" in name:
        return name
    if source:
        return re.sub(r"\.layer_norm(\d|_final_attn)", lambda m: f".norm{m[1]}", name)
    return re.sub(r"\.norm(\d|_final_attn)\.", lambda m: f".layer_norm{m[1]}.", name)
