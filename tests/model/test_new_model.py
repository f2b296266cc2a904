"""CONTRIBUTING.md, "Add a model": a network of other shapes needs its entry in MODELS alone."""

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
import train_adaptive
from tests.helpers import SMALL_EMBEDDING, build_small, call
from utils.model.segmenter import MODELS, ModelSpec, normalise_lite_medsam


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small", ModelSpec(build_small, 48, normalise_lite_medsam))
    torch.manual_seed(0)
    torch.save(build_small().state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def test_it_is_trained_and_evaluated_by_the_scripts(weights, toy_slices, tmp_path):
    where = ("--device", "cpu", "--cache-dir", tmp_path / "cache")
    train = ("--data", toy_slices, "--model", "small", "--checkpoint", weights)
    name = ("--work-dir", tmp_path, "--run", "run", "--epochs", 1, "--lr", 0.01)
    call(train_adaptive, *train, *name, *where)
    assert {np.load(path).shape for path in tmp_path.rglob("*.npy")} == {SMALL_EMBEDDING}
    before, after = pd.read_csv(tmp_path / "run" / "log.csv")["val_loss"]
    assert after < before
    out = ("--out", tmp_path / "out", "--shift", "15%", "--no-sweep", "--no-figures")
    call(evaluation, "--runs", tmp_path / "run", *out, *where)
    assert "`adaptive`: small, decoder_best.pth" in (tmp_path / "out" / "report.md").read_text()
