"""The models of an evaluation and the memory that they take."""

import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.evaluation import models as module
from utils.model.segmenter import Segmenter
from utils.system.errors import UserError
from utils.training.runs import TrainedRun


class Tiny(Segmenter):
    """A model without its networks that notes where it is moved with its image encoder."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.base_sha256 = "the same"
        self.image_encoder, self.mask_decoder = nn.Linear(1, 1), nn.Linear(1, 1)
        self.moved_with_encoder = False

    def to(self, device):
        self.moved_with_encoder = self.image_encoder is not None
        return super().to(device)


@pytest.mark.parametrize("cache", [True, False])
def test_an_image_encoder_stays_in_memory_only_where_it_is_needed(monkeypatch, cache):
    """Three models of one encoder: it goes to the device once, and stays once if at all."""
    encoders = []

    def load(*_):
        model = Tiny()
        encoders.append(weakref.ref(model.image_encoder))
        return model

    monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(module, "Embeddings", lambda model, *rest: [model, *rest])
    specs = [(name, "tiny", None) for name in "abc"]
    models, embeddings = module.load_models(specs, [], cache, "dir", torch.device("cpu"))
    assert [model.moved_with_encoder for model in models.values()] == [True, False, False]
    assert sum(encoder() is not None for encoder in encoders) == (0 if cache else 1)
    assert embeddings["a"] is embeddings["b"] is embeddings["c"]
    assert embeddings["a"][0].image_encoder is encoders[0]()  # what encodes is what was kept
    assert embeddings["a"][1:] == [[], cache, "dir"]


def made_run(name: str, **options: object) -> TrainedRun:
    options = {"policy": "adaptive", "model": "lite_medsam", "checkpoint": None} | options
    config = {"options": options, "start_weights": "1" * 64}
    return TrainedRun(name, Path(name), config, epochs=5)


def test_weights_that_the_runs_started_from_appear_once_under_the_name_that_they_are_given():
    runs = [made_run("adaptive")]
    alone = module.model_specs([], runs)
    assert [name for name, _, _ in alone] == ["untouched", "adaptive"]
    assert alone[0] == ("untouched", "lite_medsam", None)
    sam = ("sam", "sam_vit_b", "download")
    specs = module.model_specs([sam, ("lite", "lite_medsam", None)], runs)
    path = str(Path("work_dir").resolve() / "sam_vit_b_01ec64.pth")
    assert [(name, checkpoint and str(checkpoint)) for name, _, checkpoint in specs] == [
        *(("sam", path), ("lite", None), ("adaptive", str(runs[0].decoder)))
    ]
    runs = [made_run("a", model="medsam_vit_b", checkpoint="work_dir/medsam_vit_b.pth")]
    specs = module.model_specs([("medsam_weights", "medsam_vit_b", "download")], runs)
    assert [name for name, _, _ in specs] == ["medsam_weights", "a"]  # the same file
    specs = module.model_specs([("other", "medsam_vit_b", "other.pth")], runs)
    assert [name for name, _, _ in specs] == ["untouched", "other", "a"]


def test_what_can_be_downloaded_is_and_nothing_else(monkeypatch):
    fetched = []
    monkeypatch.setattr(module, "fetch", lambda source, folder: fetched.append((source, folder)))
    specs = [("sam", "sam_vit_b", "download"), ("a", "sam_vit_l", "a.pth"), ("b", "x", None)]
    module.fetch_weights(specs)
    ((source, folder),) = fetched
    assert source.file == "sam_vit_b_01ec64.pth" and folder == Path("work_dir")
    with pytest.raises(UserError, match="lite_medsam"):
        module.model_specs([("lite", "lite_medsam", "download")], [])


def test_report_names_the_epoch_of_a_runs_weights_and_says_if_it_never_got_better(monkeypatch):
    epochs = {Path("good"): 3, Path("collapsed"): 0}
    best_epoch = property(lambda run: epochs[run.folder])
    monkeypatch.setattr(TrainedRun, "best_epoch", best_epoch)
    runs = [made_run(str(folder)) for folder in epochs]
    specs = [(run.name, "lite_medsam", run.decoder) for run in runs]
    hashes, seen = dict.fromkeys(["good", "collapsed"], "0" * 64), {"good": [], "collapsed": None}
    text = module.provenance("", specs, hashes, torch.device("cpu"), runs, [], seen, 7)
    assert re.search("`good`.*, trained for 5 epochs, weights of epoch 3; .* seen: 0 of 7", text)
    assert re.search("`collapsed`.* 5 epochs, none better than the weights it started from", text)
    assert text.count("seen: not recorded") == 1
