"""--export --format transformers: the same masks by Hugging Face's own code, and a model card.

With random ViT-B weights and a run that is written by hand: training one takes minutes on a CPU.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry

import train_adaptive
from tests.helpers import edit_json, options_for
from utils.data.frame import Frame
from utils.model.segmenter import fine_tuned_weights, load_model, save_decoder
from utils.model.transformers_format import from_transformers, to_transformers
from utils.training import runs
from utils.training.transformers_export import VISION, network_config

transformers = pytest.importorskip("transformers")
SQUARE = Frame((1024, 1024), (1024, 1024))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Runs of medsam_vit_b and sam_vit_b from the same random weights, with another decoder."""
    work = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    torch.save(sam_model_registry["vit_b"]().state_dict(), work / "base.pth")
    for name in ("medsam_vit_b", "sam_vit_b"):
        model = load_model(name, work / "base.pth", "cpu")
        with torch.no_grad():
            for weight in model.mask_decoder.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        options = options_for(work / "data", model=name, checkpoint=str(work / "base.pth"))
        facts = {"start_weights": model.base_sha256, "data": {"ct": {"window": [-160.0, 240.0]}}}
        facts["box_code"] = {"constants": {"delta_expand_used": 102.4}, "fingerprints": {}}
        runs.start_run(work / name, vars(options), **facts)
        save_decoder(work / name / runs.BEST, model, {}, epoch=2, val_loss=0.1)
        (work / name / runs.LOG).write_text(
            "epoch,dsc_standard,dsc_expansion,dsc_shrink\n0,0.1,0.2,0.3\n1,0.4,0.5,0.6\n"
            "2,0.871,0.862,0.753\n"
        )
    return work


def export(work: Path, name: str, out: Path) -> None:
    words = ["--work-dir", str(work), "--run", name, "--export", str(out)]
    train_adaptive.main([*words, "--format", "transformers"])


@pytest.mark.parametrize("size", VISION)
def test_names_of_all_sizes_are_those_of_transformers_and_back(size):
    with torch.device("meta"):
        ours = sam_model_registry[size]().state_dict()
        config = transformers.SamConfig(**network_config(size))
        theirs = transformers.SamModel(config).state_dict()
    renamed = to_transformers(ours)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.items()}
    back = from_transformers(renamed)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}


@pytest.mark.parametrize("name", ["medsam_vit_b", "sam_vit_b"])
def test_transformers_gives_the_same_masks(work, tmp_path, name):
    """From the image to the probability; the two models differ in how they normalise it, so of the
    second one that alone is compared."""
    export(work, name, tmp_path / "hf")
    processor = transformers.SamProcessor.from_pretrained(tmp_path / "hf")
    grey = np.random.default_rng(0).integers(0, 256, (1024, 1024)).astype(np.uint8)
    boxes = np.array([[100, 200, 400, 500], [600, 30, 640, 90]], np.float32)
    inputs = processor(
        np.repeat(grey[..., None], 3, axis=2), input_boxes=[boxes.tolist()], return_tensors="pt"
    )
    ours = load_model(name, work / name / runs.BEST, "cpu")
    normalised = ours._normalise(torch.from_numpy(grey)[None], [SQUARE])
    assert torch.allclose(inputs["pixel_values"], normalised, atol=1e-5)
    if name == "sam_vit_b":
        return
    model = transformers.SamModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        embedding = ours.encode(torch.from_numpy(grey)[None], [SQUARE])
        theirs = model.get_image_embeddings(inputs["pixel_values"])
        assert torch.allclose(theirs, embedding, atol=1e-3)
        logits = ours.decode(embedding[0], boxes)
        masks = model(
            image_embeddings=theirs, input_boxes=inputs["input_boxes"], multimask_output=False
        ).pred_masks[0, :, 0]
    assert (logits.sigmoid() - masks.sigmoid()).abs().max() < 1e-4
    assert logits.std() > 0.01


def test_the_model_card_is_made_from_the_run(work, tmp_path, capfd):
    export(work, "medsam_vit_b", tmp_path / "hf")
    names = {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| 87.1 | 86.2 | 75.3 |" in card and "Epoch 2 of 2" in card
    assert "-160.0 to 240.0 HU" in card and "policy `adaptive`; delta_expand_used 102.4" in card
    assert "base.pth, SHA-256 " in card and "zenodo.org/records/10689643" in card
    assert "not a medical device" in card and "{" not in card
    assert str(tmp_path) not in card and str(work) not in card
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["do_normalize"] is False
    assert "SamModel.from_pretrained" in capfd.readouterr().out


def test_the_card_of_a_mean(work, tmp_path):
    shutil.copytree(work / "medsam_vit_b", tmp_path / "mean")
    (tmp_path / "mean" / runs.LOG).unlink()
    (tmp_path / "mean" / runs.AVERAGE).write_text(
        "decoder,kept,standard,expansion 15%,shrink 15%\na,yes,.1,.2,.3\nmean,,0.9,0.8,0.7\n"
    )

    def to_mean(config: dict) -> None:
        of = {"run": "a", "kept": True, "options": config["options"]}
        other = of["options"] | {"policy": "mixed"}
        config["average"] = [of, of | {"options": other}, of | {"kept": False}]
        names = ("model", "checkpoint", "data")
        config["options"] = {name: config["options"][name] for name in names}

    edit_json(tmp_path / "mean" / "config.json", to_mean)
    export(tmp_path, "mean", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Mean of 2 decoders." in card and "| 90.0 | 80.0 | 70.0 |" in card
    assert "policy `adaptive, mixed`" in card


def test_safetensors_are_weights_to_start_from(work, tmp_path, fails):
    """Those of transformers, and with SAM's own names."""
    from safetensors.torch import save_file

    export(work, "medsam_vit_b", tmp_path / "hf")
    _, expected = fine_tuned_weights(work / "medsam_vit_b" / runs.BEST)
    save_file(expected, tmp_path / "sam.safetensors")
    for path in (tmp_path / "hf" / "model.safetensors", tmp_path / "sam.safetensors"):
        model = load_model("medsam_vit_b", path, "cpu")
        for key, value in model.mask_decoder.state_dict().items():
            assert torch.equal(value, expected[f"mask_decoder.{key}"])
    content = path.read_bytes()
    for damaged in (content[:100], b"", b"\xff" * 64):
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        with pytest.raises(train_adaptive.UserError, match="damaged or not safetensors"):
            load_model("medsam_vit_b", tmp_path / "bad.safetensors", "cpu")


def test_folders_that_cannot_be(work, tmp_path, fails):
    def message(*words: object) -> str:
        return fails(train_adaptive.main, "--work-dir", work, *words)

    hf = ("--format", "transformers")
    assert "--format: goes with --export" in message("--run", "x", "--data", "d", *hf)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    run = ("--run", "medsam_vit_b", "--export")
    assert "already exists" in message(*run, tmp_path / "full", *hf)
    shutil.copytree(work / "medsam_vit_b", work / "lite")
    edit_json(work / "lite" / "config.json", lambda c: c["options"].update(model="lite_medsam"))
    no = message("--run", "lite", "--export", tmp_path / "new", *hf)
    assert "transformers has no lite_medsam" in no and not (tmp_path / "new").exists()
