"""Weights on the disk: read safely, loaded strictly, written atomically.

Full weights may be a dict of tensors, as SAM, MedSAM and LiteMedSAM publish them, or what training
scripts save: within a dict under one of WRAPPERS, and with some of PREFIXES before every name. They
may be safetensors or have the names of Hugging Face's transformers.
"""

import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from utils.system import UserError
from utils.system.files import atomic_write

RESTORE = "restore the file, or start from another"
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "net", "model")
PREFIXES = ("module.", "_orig_mod.", "sam.")  # of several GPUs, torch.compile, and a network around
SHARED = "shared_image_embedding.positional_embedding"  # transformers' copy of POSITIONS
POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
HEADS = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{n}" for n in range(4)))
RENAMED = (  # parts of SAM's names and of transformers', in this order or backwards
    (".norm", ".layer_norm"),
    ("image_encoder.", "vision_encoder."),
    ("vision_encoder.blocks.", "vision_encoder.layers."),
    ("patch_embed.proj.", "patch_embed.projection."),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", POSITIONS),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    *((f"{head}.layers.0.", f"{head}.proj_in.") for head in HEADS),
    *((f"{head}.layers.1.", f"{head}.layers.0.") for head in HEADS),
    *((f"{head}.layers.2.", f"{head}.proj_out.") for head in HEADS),
)


def save_checkpoint(path: Path, content: dict) -> None:
    """Save a dict of weights and numbers atomically."""
    with atomic_write(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict:
    """Read a dict saved by torch.save, or safetensors; nothing in the file is executed.

    Raises UserError: missing, unreadable, damaged, or not a dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the path of a .pth file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are refused anyway
            if zipfile.is_zipfile(path):  # whose checksums torch.load ignores
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():
                        raise zipfile.BadZipFile
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler raises almost anything
        if found := re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error)):
            save = (
                f"torch.save(torch.load({str(path)!r}, weights_only=False)['model'], 'weights.pth')"
            )
            raise UserError(
                f"{path}: holds objects ({found[1]}), which are not loaded; if you trust the file, "
                f"save only its weights: {save}, with the file's own key in place of 'model'"
            ) from error
        raise UserError(f"{path}: damaged or not a checkpoint of weights; {RESTORE}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return content


def full_weights(content: dict) -> dict:
    """The network's state dict in a file's content, published weights or a training checkpoint."""
    weights = content
    for _ in range(3):  # one within another
        weights = next((weights[k] for k in WRAPPERS if isinstance(weights.get(k), dict)), weights)
    while weights and (prefix := _common_prefix(weights)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    if not any(str(name).startswith("vision_encoder.") for name in weights):
        return weights
    return {_rename(name.replace(SHARED, POSITIONS), 1, 0): t for name, t in weights.items()}


def _common_prefix(names: Iterable[object]) -> str | None:
    """The one of PREFIXES that every name has."""
    return next((p for p in PREFIXES if all(str(name).startswith(p) for name in names)), None)


def transformers_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SAM's state dict with the names of Hugging Face's transformers."""
    renamed = {_rename(name, 0, 1): value for name, value in weights.items()}
    return renamed | {SHARED: renamed[POSITIONS].clone()}


def _rename(name: str, source: int, target: int) -> str:
    for names in RENAMED[:: target - source]:
        name = name.replace(names[source], names[target])
    return name


def load_state(module: nn.Module, state: object, path: Path, name: str) -> None:
    """Load a state dict, or what a file holds in its place; `path` and `name` are for messages.

    Raises UserError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    weights = state if isinstance(state, dict) else {}
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:  # AttributeError: a name that is not a str
        own = module.state_dict()
        fitting = sum(getattr(weights.get(k), "shape", None) == v.shape for k, v in own.items())
        raise UserError(
            f"{path}: not weights of {name}: {fitting} of its {len(own)} tensors are in the "
            f"file's {len(weights)}; choose the model that it belongs to"
        ) from error
    for key, value in module.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} is not finite; {RESTORE}")
