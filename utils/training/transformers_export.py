"""A run as a folder that SamModel and SamProcessor of Hugging Face's transformers load."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from safetensors.torch import save

from utils.model.checkpoints import read_checkpoint
from utils.model.segmenter import MODELS, SAM_PIXEL_MEAN, SAM_PIXEL_STD, fine_tuned_weights
from utils.model.transformers_format import to_transformers
from utils.system import UserError
from utils.system.downloads import WEIGHTS
from utils.system.files import atomic_write, new_folder, read_bytes, write_json
from utils.training.runs import AVERAGE, LOG, TrainedRun

# By model: width, layers, heads and global attention of the image encoder, as SAM builds them.
VISION = {
    "vit_b": (768, 12, 12, [2, 5, 8, 11]),
    "vit_l": (1024, 24, 16, [5, 11, 17, 23]),
    "vit_h": (1280, 32, 16, [7, 15, 23, 31]),
}
CARD = """---
library_name: transformers
pipeline_tag: mask-generation
tags: [medical, segmentation, medsam, ct]
---

# {name} with a mask decoder fine-tuned on {policy} boxes

Segments the target in a box on a CT slice. The image encoder and the prompt encoder are those of
{name}; the mask decoder was fine-tuned with [MedSAM with adaptive box
perturbation](https://arxiv.org/abs/2503.19700).

    from transformers import SamModel, SamProcessor
    model, processor = (kind.from_pretrained("FOLDER") for kind in (SamModel, SamProcessor))

Ask for one mask (`multimask_output=False`): the others were not trained. Images are slices of
{window} HU, mapped to grey levels 0-255, in three equal channels; the processor normalises them as
the base weights need it.

- **Base weights**: {base}, SHA-256 {base_sha256}. Licence: {licence}.
- **Training data**: {data}. Its licence may forbid some uses of these weights.
- **Boxes**: policy `{policy}`; {constants}.
- **Options**: {options}.

## Scores

{scores_of} DSC in % on the validation patients, by whom the weights were chosen, so not an estimate
for new patients. Expansion and shrink boxes are off by up to 15 % of the side.

{scores}

## What it is not for

It is not a medical device, and not for diagnosis. It was not tested on scanners, organs or kinds of
box other than those of its training data, unless the above says so. It returns a mask for any box,
also where there is no target.
"""


def export_folder(run: TrainedRun, folder: Path) -> str:
    """Write the new folder `folder`: weights, config, processor, and a card made from the run.

    Returns:
        The model's name.

    Raises:
        UserError: `folder` exists or cannot be written, LiteMedSAM, or as `fine_tuned_weights`.
    """
    model = run.options["model"]
    size = next((size for size in VISION if model.endswith(size)), None)
    if size is None:
        raise UserError(f"{run.folder}: transformers has no {model}; export it without --format")
    name, weights = fine_tuned_weights(run.decoder)
    with new_folder(folder) as made:
        tensors = {key: value.contiguous() for key, value in to_transformers(weights).items()}
        with atomic_write(made / "model.safetensors") as file:
            file.write(save(tensors, metadata={"format": "pt"}))
        write_json(made / "config.json", network_config(size))
        write_json(made / "preprocessor_config.json", processor_config(name))
        with atomic_write(made / "README.md", "w") as file:
            file.write(card(run, name))
    return name


def network_config(size: str) -> dict:
    """SamModel's options for one of VISION."""
    width, layers, heads, indexes = VISION[size]
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "dtype": "float32",
        "vision_config": vision | {"global_attn_indexes": indexes, "mlp_dim": 4 * width},
        "prompt_encoder_config": {},
        "mask_decoder_config": {},
    }


def processor_config(name: str) -> dict:
    """SamProcessor's options: MedSAM's images are in [0, 1], SAM's have its mean and SD."""
    side = MODELS[name].input_size
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": name != "medsam_vit_b",
        "image_mean": [value / 255 for value in SAM_PIXEL_MEAN],
        "image_std": [value / 255 for value in SAM_PIXEL_STD],
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
    }


def card(run: TrainedRun, name: str) -> str:
    """The model card, Markdown, from what the run has recorded."""
    config, options = run.config, run.options
    if run.average_of:
        several = [each["options"] for each in config["average"] if each["kept"]]
        policies = ", ".join(dict.fromkeys(each["policy"] for each in several))
        options = {key: value for key, value in several[0].items() if key != "seed"}
        scores_of = f"Mean of {len(several)} decoders."
        scores = _table(run.folder / AVERAGE, -1, ("standard", "expansion 15%", "shrink 15%"))
    else:
        policies, scores_of = options["policy"], f"Epoch {run.best_epoch} of {run.epochs}."
        columns = ("dsc_standard", "dsc_expansion", "dsc_shrink")
        scores = _table(run.folder / LOG, run.best_epoch, columns)
    constants = config.get("perturbation", {})
    windows = {str(of["window"]) for of in config["data"].values() if isinstance(of, dict)}
    trained = {key: options[key] for key in ("lr", "weight_decay", "ema", "loss_resolution")}
    decoder = read_checkpoint(run.decoder)
    return CARD.format(
        name=name,
        policy=policies,
        window=" or ".join(sorted(windows)).replace("[", "").replace("]", "").replace(",", " to"),
        base=Path(decoder["base"]).name,
        base_sha256=decoder["base_sha256"],
        licence=WEIGHTS[name].terms,
        data=", ".join(config["data"]),
        constants=", ".join(f"{key} {value:g}" for key, value in constants.items()) or "none",
        options=", ".join(f"{key} {value:g}" for key, value in trained.items()),
        scores_of=scores_of,
        scores=scores,
    )


def _table(path: Path, row: int, columns: tuple[str, str, str]) -> str:
    """A row of a CSV file as a table of the three kinds of box."""
    lines = list(csv.DictReader(io.StringIO(read_bytes(path).decode())))
    values = [f"{100 * float(lines[row][column]):.1f}" for column in columns]
    head = "| standard | expansion | shrink |\n|---|---|---|"
    return f"{head}\n| {' | '.join(values)} |"
