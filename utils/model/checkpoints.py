"""Files of weights: reading them safely, telling what they are of, and writing them whole.

What comes in: full weights as SAM, MedSAM and LiteMedSAM publish them (a dict of tensors), as
MedSAM's and LiteMedSAM's training scripts save them ({"model": ..., "optimizer": ...}, on several
GPUs with "module." before every name), and this project's own files.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from utils.system.errors import UserError
from utils.system.files import atomic_write

RESTORE = "restore the file, or start from another"
PARALLEL = "module."  # what DistributedDataParallel puts before the names of tensors


def save_checkpoint(path: Path, content: dict) -> None:
    """Save a dict of weights and numbers; the old file stays intact until the new one is whole."""
    with atomic_write(path) as file:
        torch.save(content, file)


def read_checkpoint(path: Path) -> dict:
    """Read a dict saved by torch.save; nothing in the file is executed.

    Raises:
        UserError: missing, unreadable, damaged, or not a dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; give the path of a .pth file")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles: an error comes anyway
            # torch.load takes no notice of the checksums in its files; older files have none.
            damaged = zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip()
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises what its unpickler happens to raise
        raise UserError(f"{path}: damaged or not a checkpoint of weights; {RESTORE}") from error
    if damaged:
        raise UserError(f"{path}: damaged ({damaged}); {RESTORE}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    return content


def full_weights(content: dict) -> dict:
    """The network's tensors by name, of a file's content: as published, or as training saves it."""
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    if weights and all(isinstance(key, str) and key.startswith(PARALLEL) for key in weights):
        weights = {key.removeprefix(PARALLEL): value for key, value in weights.items()}
    return weights


def fits(module: nn.Module, weights: object) -> bool:
    """Whether `weights` hold the module's tensors, all of them and no other."""
    return _kinds(module.state_dict()) == _kinds(weights)


def load_state(
    module: nn.Module, state: object, path: Path, name: str, others: Iterable[str] = ()
) -> None:
    """Load weights that fit exactly.

    Args:
        module: gets the weights.
        state: a dict of tensors, if the file is what it should be.
        path: the file, for the message.
        name: of the model asked for.
        others: names of the models that the weights do fit; asked for only when they do not fit.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or kind, or not finite.
    """
    expected, found = _kinds(module.state_dict()), _kinds(state)
    if expected != found:
        if belong_to := list(others):
            raise UserError(
                f"{path}: weights of {' or '.join(belong_to)}, not of {name}; name that model"
            )
        fitting = sum(found.get(key) == kind for key, kind in expected.items())
        raise UserError(
            f"{path}: not weights of {name}: {fitting} of its {len(expected)} tensors are in the "
            f"file's {len(found)}; give the model that they belong to"
        )
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} is not finite; {RESTORE}")
    module.load_state_dict(state)


def _kinds(weights: object) -> dict:
    """By name, what two tensors must have in common for one to be loaded into the other."""
    values = weights if isinstance(weights, dict) else {}
    return {key: _kind(value) for key, value in values.items()}


def _kind(value: object) -> tuple | None:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return None
    return value.shape, value.is_floating_point(), value.is_complex()
