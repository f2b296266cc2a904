"""Weights on the disk: read safely, loaded strictly, written atomically.

Accepted are full weights as SAM, MedSAM and LiteMedSAM publish them (a dict of tensors) or as their
training scripts save them ({"model": ..., "optimizer": ...}, on several GPUs with "module." before
every name), as safetensors too, those of Hugging Face's transformers among them, and this project's
own files.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from utils.model.transformers_format import are_transformers, from_transformers
from utils.system import UserError
from utils.system.files import atomic_write

RESTORE = "restore the file, or start from another"
SAFETENSORS = ".safetensors"
PARALLEL = "module."  # DistributedDataParallel's prefix of tensor names


def save_checkpoint(path: Path, content: dict) -> None:
    """Save a dict of weights and numbers atomically."""
    with atomic_write(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict:
    """Read a dict saved by torch.save, or safetensors; nothing in the file is executed.

    Raises:
        UserError: missing, unreadable, damaged, or not a dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the path of a .pth file")
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are refused anyway
            # torch.load ignores the checksums in its ZIP files; a flipped bit would be a weight.
            damaged = zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip()
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler raises almost anything
        raise UserError(f"{path}: damaged or not a checkpoint of weights; {RESTORE}") from error
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); {RESTORE}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return content


def _read_safetensors(path: Path) -> dict:
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # SafetensorError, and what a header that lies leads to
        raise UserError(f"{path}: damaged or not safetensors; {RESTORE}") from error


def full_weights(content: dict) -> dict:
    """The network's state dict in a file's content, published weights or a training checkpoint."""
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    if weights and all(isinstance(key, str) and key.startswith(PARALLEL) for key in weights):
        weights = {key.removeprefix(PARALLEL): value for key, value in weights.items()}
    return from_transformers(weights) if are_transformers(weights) else weights


def load_state(module: nn.Module, state: object, path: Path, name: str) -> None:
    """Load a state dict strictly.

    Args:
        module: receives the weights.
        state: the state dict, or whatever a damaged file holds in its place.
        path: the file, for messages.
        name: the model, for messages.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    weights = state if isinstance(state, dict) else {}
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:  # AttributeError: a name that is not a str
        own = module.state_dict()
        fitting = sum(getattr(weights.get(k), "shape", None) == v.shape for k, v in own.items())
        raise UserError(
            f"{path}: not weights of {name}: {fitting} of its {len(own)} tensors are in the "
            f"file's {len(weights)}; give the model that they belong to"
        ) from error
    for key, value in module.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} is not finite; {RESTORE}")
