"""CONTRIBUTING.md, "Add a model": a network of other shapes needs its entry in MODELS alone."""

import csv

import numpy as np
import pytest
import torch

import eval as evaluation
import train_adaptive
from tests.helpers import SMALL_EMBEDDING, build_small, call
from utils.data.slices import open_dataset
from utils.model.embeddings import Embeddings
from utils.model.segmenter import MODELS, ModelSpec, load_model, normalise_lite_medsam


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of a registered model's weights."""
    monkeypatch.setitem(MODELS, "small", ModelSpec(build_small, 48, normalise_lite_medsam))
    torch.manual_seed(0)
    torch.save(build_small().state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_embeddings_and_masks_have_the_networks_shapes(weights, toy_slices, tmp_path):
    model = load_model("small", weights, "cpu")
    samples = open_dataset(toy_slices).split("val")
    embeddings = Embeddings(model, samples, cache_dir=tmp_path / "cache")
    assert {np.load(path).shape for path in tmp_path.rglob("*.npy")} == {SMALL_EMBEDDING}
    box, scaled = np.array([[0, 0, 511, 1023]], np.float32), torch.tensor([[0, 0, 127, 255]])
    with torch.no_grad():
        batch = embeddings.embed([embeddings.load(sample) for sample in samples], samples)
        found = model.decode_batch(batch, [box, box])
        prompts = model.prompt_encoder(points=None, boxes=scaled, masks=None)
        position = model.prompt_encoder.get_dense_pe()
        theirs = model.mask_decoder(embeddings(samples[0])[None], position, *prompts, False)[0]
    assert found.shape == (2, 64, 64)
    assert torch.allclose(found[:1], theirs[:, 0], atol=1e-5)


def test_it_is_trained_and_evaluated_by_the_scripts(weights, toy_slices, tmp_path):
    where = ("--device", "cpu", "--cache-dir", tmp_path / "cache")
    train = ("--data", toy_slices, "--model", "small", "--checkpoint", weights)
    name = ("--work-dir", tmp_path, "--run", "run", "--epochs", 1, "--lr", 0.01)
    call(train_adaptive, *train, *name, *where)
    with open(tmp_path / "run" / "log.csv") as file:
        before, after = csv.DictReader(file)
    assert float(after["val_loss"]) < float(before["val_loss"])
    out = ("--out", tmp_path / "out", "--shift", "15%", "--no-sweep", "--no-figures")
    call(evaluation, "--runs", tmp_path / "run", *out, *where)
    assert "`adaptive`: small, decoder_best.pth" in (tmp_path / "out" / "report.md").read_text()
