"""Exported weights: the same masks by other programs' own code, and a model card."""

import shutil

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry
from torch.nn import functional as F

import train_adaptive
from tests.helpers import assert_same_weights, build_small, call
from utils.data.frame import Frame
from utils.model.checkpoints import transformers_weights
from utils.model.export import export_transformers, export_weights, model_card, network_config
from utils.model.segmenter import MODELS, ModelSpec, load_model, normalise_lite_medsam
from utils.system import UserError
from utils.system.files import write_json
from utils.training import runs

FRAME = Frame((1024, 1024), (1024, 1024))
SHORT = 1  # of 12 blocks of an image encoder: all is compared, tensor by tensor, elsewhere
BOXES = np.array([[100, 200, 400, 500], [600, 30, 640, 90]], np.float32)
OPTIONS = {"policy": "adaptive", "model": "medsam_vit_b", "epochs": 3, "seed": 0}
CONFIG = {
    "options": OPTIONS | {"lr": 1e-4, "weight_decay": 0.01, "ema": 0.0, "loss_resolution": 256},
    "data": {"ct": {"window": [-160.0, 240.0]}},
    "perturbation": {"policy": "adaptive", "delta_expand": 102.4},
}
SCORES = {"epoch": "2", "dsc_standard": ".871", "dsc_expansion": ".862", "dsc_shrink": ".753"}


@pytest.fixture(scope="module")
def grey() -> torch.Tensor:
    return torch.randint(256, (1024, 1024), generator=torch.Generator().manual_seed(0)).byte()


def probabilities(model, grey: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model.decode(model.encode(grey[None], [FRAME])[0], BOXES)
    assert logits.std() > 0.01  # not one value everywhere
    return logits.sigmoid()


def pasted(printed: str) -> dict:
    """The names that the printed lines define: they are run as a user pastes them."""
    names: dict = {}
    exec(printed.partition("with\n")[2], names)
    return names


def test_weights_in_segment_anything(vit_b, fine_tune, grey, tmp_path, capsys):
    model, path = fine_tune("medsam_vit_b", vit_b), tmp_path / "exported.pth"
    export_weights(model, path)
    sam = pasted(capsys.readouterr().out)["model"]
    path.unlink()  # 375 MB
    for encoder in (model.image_encoder, sam.image_encoder):
        encoder.blocks = encoder.blocks[:SHORT]
    with torch.no_grad():
        boxes = torch.from_numpy(BOXES)[:, None]
        prompts = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        embedding = sam.image_encoder((grey.float() / 255).expand(1, 3, -1, -1))
        logits = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), *prompts, False)[0]
    assert torch.allclose(probabilities(model, grey), logits[:, 0].sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["medsam_vit_b", "sam_vit_b", "sam_vit_l", "sam_vit_h"])
def test_lines_for_segment_anything_are_of_the_models_size(monkeypatch, tmp_path, capsys, name):
    """With a small network in the place of each size."""
    torch.manual_seed(0)
    torch.save(build_small().state_dict(), tmp_path / "base.pth")
    monkeypatch.setitem(MODELS, name, ModelSpec(build_small, 48, normalise_lite_medsam))
    size = name.partition("_")[2]
    for other in sam_model_registry:
        monkeypatch.setitem(sam_model_registry, other, None)
    monkeypatch.setitem(sam_model_registry, size, build_small_from)
    ours = load_model(name, tmp_path / "base.pth", "cpu")
    with torch.no_grad():
        ours.mask_decoder.mask_tokens.weight.add_(1)
    export_weights(ours, tmp_path / "it's exported.pth")
    theirs = pasted(capsys.readouterr().out)["model"]
    assert_same_weights(theirs.state_dict(), ours.state_dict())
    assert not theirs.training


def build_small_from(checkpoint: str) -> torch.nn.Module:
    network = build_small()
    network.load_state_dict(torch.load(checkpoint))
    return network


def test_weights_in_litemedsams_loader(lite_medsam, fine_tune, grey, tmp_path, capsys):
    model, path = fine_tune("lite_medsam", lite_medsam.base_path), tmp_path / "exported.pth"
    export_weights(model, path)
    network = pasted(capsys.readouterr().out)["model"]
    image = F.avg_pool2d(grey[None, None].float() / 255, 4).expand(1, 3, -1, -1)
    with torch.no_grad():
        logits = network(image, (BOXES[:1] + [0, 0, 1, 1]) / 4 - [0, 0, 1, 1])[0, 0]
    assert torch.allclose(probabilities(model, grey)[0], logits.sigmoid(), rtol=0, atol=1e-5)
    path.write_bytes(b"weights of years")
    with pytest.raises(UserError, match="exported.pth: already exists"):
        export_weights(model, path)
    with pytest.raises(UserError, match="transformers has no lite_medsam"):
        export_transformers(model, tmp_path / "folder", CONFIG, SCORES)
    assert path.read_bytes() == b"weights of years" and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("size", ["vit_l", "vit_h"])
def test_names_are_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        network = sam_model_registry[size]()
        config = transformers.SamConfig(**network_config(network.image_encoder))
        theirs = transformers.SamModel(config).state_dict()
    renamed = transformers_weights(network.state_dict())
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["medsam_vit_b", "sam_vit_b"])
def test_transformers_gives_the_same_masks(vit_b, fine_tune, grey, tmp_path, capsys, name):
    pytest.importorskip("transformers")
    ours = fine_tune(name, vit_b)
    export_transformers(ours, tmp_path / "hf", CONFIG, SCORES)
    names = pasted(capsys.readouterr().out)
    theirs, processor = names["model"], names["processor"]
    image = np.repeat(grey[..., None].numpy(), 3, axis=2)
    inputs = processor(image, input_boxes=[BOXES.tolist()], return_tensors="pt")
    expected = MODELS[name].normalise(grey[None], [FRAME])
    assert torch.allclose(inputs["pixel_values"], expected, atol=1e-4)
    if name == "sam_vit_b":
        return  # the same network
    theirs.vision_encoder.layers = theirs.vision_encoder.layers[:SHORT]
    ours.image_encoder.blocks = ours.image_encoder.blocks[:SHORT]
    with torch.no_grad():
        masks = theirs(**inputs, multimask_output=False).pred_masks[0, :, 0]
    assert (probabilities(ours, grey) - masks.sigmoid()).abs().max() < 1e-4


def test_folder_of_a_run_and_model_cards(vit_b, fine_tune, tmp_path, capfd):
    model = fine_tune("medsam_vit_b", vit_b)
    folder = tmp_path / "work" / "mine"
    record = {"perturb_sha256": "", "start_weights": model.base_sha256}
    write_json(folder / runs.CONFIG, CONFIG | record)
    shutil.copy(tmp_path / "decoder.pth", folder / runs.BEST)
    rows = [f"epoch,{','.join(list(SCORES)[1:])}", "0,.1,.2,.3", "1,.4,.5,.6"]
    (folder / runs.LOG).write_text("\n".join([*rows, ",".join(SCORES.values()), ""]))
    run = ("--work-dir", tmp_path / "work", "--run", "mine")
    call(train_adaptive, *run, "--export", tmp_path / "hf", "--format", "transformers")
    assert "trained for 2 of 3 epochs so far" in capfd.readouterr().out
    again = load_model("medsam_vit_b", tmp_path / "hf" / "model.safetensors", "cpu")
    assert_same_weights(again.state_dict(), model.state_dict())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| 87.1 | 86.2 | 75.3 |" in card and "Epoch 2 of 3" in card
    assert "-160.0 to 240.0 HU" in card and "policy adaptive, delta_expand 102.4" in card
    assert "not a medical device" in card and "{" not in card and str(tmp_path) not in card
    of = {"run": "a", "kept": True, "options": CONFIG["options"]}
    other = of | {"options": CONFIG["options"] | {"policy": "mixed"}}
    config = {"average": [of, other, of | {"kept": False}], "options": OPTIONS}
    scores = {"decoder": "mean", "standard": 0.9, "expansion 15%": 0.8, "shrink 15%": 0.7}
    card = model_card(model, config | {"data": CONFIG["data"]}, scores)
    assert "Mean of 2 decoders." in card and "| 90.0 | 80.0 | 70.0 |" in card
    assert "policy adaptive, mixed" in card
    with pytest.raises(UserError, match="hf"):  # it is there, and not replaced
        export_transformers(model, tmp_path / "hf", CONFIG, SCORES)
