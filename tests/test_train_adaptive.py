"""Training with LiteMedSAM's own weights on the toy data."""

import itertools
import math
import os
import pkgutil
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import perturb
import train_adaptive
from tests.helpers import (
    TOY_NAMES,
    all_in_split,
    assert_same,
    assert_same_weights,
    call,
    copy_slices,
    edit_json,
    options_for,
    results,
)
from train_adaptive import train
from utils.data.slices import open_dataset
from utils.model.checkpoints import read_checkpoint
from utils.model.graphs import GraphedDecoder
from utils.model.segmenter import load_model, logits_to_native
from utils.system import UserError, files
from utils.system.loops import prefetch
from utils.system.signals import Interrupted
from utils.training import runs, validation
from utils.training.batches import Batch, TargetStore, chunks
from utils.training.losses import segmentation_loss
from utils.training.options import parse_options

pytestmark = pytest.mark.usefixtures("small_lite_medsam")

EPOCHS = 2
EMA = 0.7  # half of it is gone after two steps


@pytest.fixture(scope="module")
def finished(toy_slices, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(options_for(toy_slices), folder)
    return folder


@pytest.fixture(scope="module")
def smoothed(toy_slices, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "smoothed"
    train(options_for(toy_slices, ema=EMA), folder)
    return folder


def before(patch: pytest.MonkeyPatch, name: str, action: Callable, only: int = 0) -> None:
    """Have an action done with a function's arguments before each call, or before the n-th only."""
    function, numbers = pkgutil.resolve_name(name), itertools.count(1)

    def announced(*args, **kwargs):
        if next(numbers) == only or not only:
            action(*args)
        return function(*args, **kwargs)

    patch.setattr(name, announced)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def recorded(toy_slices, tmp_path_factory) -> SimpleNamespace:
    """A run with another policy, seed and factors: its folder and its boxes."""
    seen = SimpleNamespace(folder=tmp_path_factory.mktemp("runs") / "recorded")
    seen.settings, seen.validation = [], []
    shifted = validation.shift_boxes

    def validation_boxes(*args):
        seen.validation.append(shifted(*args))
        return seen.validation[-1]

    too_large = 2 * perturb.DELTA_EXPAND_MAX
    changes = {"policy": "scaled", "delta_expand": too_large, "epsilon_shrink": -50.0, "seed": 3}
    changes |= {"reading": "cosine", "literal": True}
    with pytest.MonkeyPatch.context() as patch:
        before(patch, "utils.training.batches.perturb", lambda *a: seen.settings.append(a[-1]))
        patch.setattr(validation, "shift_boxes", validation_boxes)
        train(options_for(toy_slices, **changes), seen.folder)
    return seen


def test_run_folder(finished, toy_slices):
    names = {"config.json", "perturb.py", "log.csv", "curves.png"}
    names |= {"checkpoint_last.pth", "decoder_best.pth"}
    assert {path.name for path in finished.iterdir()} == names
    config = files.read_json(finished / "config.json")
    assert config["options"]["data"] == [str(toy_slices)] and config["options"]["batch"] == 1
    assert (finished / "perturb.py").read_bytes() == Path(perturb.__file__).read_bytes()
    dataset = open_dataset(toy_slices)
    of_data = {"sha256": dataset.sha256, "window": list(dataset.window)}
    of_data["label_names"] = {str(label): name for label, name in TOY_NAMES.items()}
    for split in ("train", "val"):
        cases = {sample.case for sample in dataset.split(split)}
        of_data[split] = {case: dataset.volumes[case] for case in cases}
    assert config["data"] == {"toy": of_data}
    assert set(config["versions"]) >= {"python", "torch", "numpy", "nibabel", "pandas"}
    log = results(finished)["log"]
    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert log[0]["train_loss"] == "nan"  # the weights before training
    assert float(log[-1]["val_loss"]) < float(log[0]["val_loss"])


def test_decoder_records_the_patients_that_its_weights_have_seen(
    finished, toy_slices, tmp_path, capsys
):
    """Also those of the run that it started from, which are patients of other splits here."""
    dataset = open_dataset(toy_slices)
    (trained, retrained), (chosen_by,), (new,) = (
        sorted({entry.case for entry in dataset.split(split)}) for split in ("train", "val", "test")
    )
    seen = {trained: "train", retrained: "train", chosen_by: "val"}
    assert runs.seen_patients(finished / "decoder_best.pth") == {
        dataset.volumes[case]: split for case, split in seen.items()
    }
    splits = {trained: "val", retrained: "test", chosen_by: "train", new: "val"}

    def shuffle(meta):
        for case, split in splits.items():
            meta["cases"][case]["split"] = split

    other, start = copy_slices(toy_slices, tmp_path / "other", shuffle), str(finished / runs.BEST)
    train(options_for(other, checkpoint=start, epochs=1), tmp_path / "chain")
    assert runs.seen_patients(tmp_path / "chain" / "decoder_best.pth") == {
        image: "val" if case == new else "train" for case, image in dataset.volumes.items()
    }
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert f"{start} was trained on 1 of the patients in val (toy/{trained}):" in line


def test_only_the_decoder_changes(finished):
    trained = load_model("lite_medsam", finished / "decoder_best.pth", "cpu")
    start = load_model("lite_medsam", None, "cpu").state_dict()
    changed = {k for k, v in trained.state_dict().items() if not torch.equal(v, start[k])}
    assert changed and all(key.startswith("mask_decoder.") for key in changed)
    assert "mask_decoder.output_hypernetworks_mlps.0.layers.0.weight" in changed


def test_policy_and_factors_reach_the_boxes(recorded):
    factors = {"delta_expand": perturb.DELTA_EXPAND_MAX, "epsilon_shrink": -50.0}
    used = perturb.Perturbation("scaled", "cosine", **factors, literal=True)
    assert recorded.settings == [used] * 8 * EPOCHS
    config = files.read_json(recorded.folder / "config.json")
    assert config["options"]["delta_expand"] == 2 * perturb.DELTA_EXPAND_MAX
    assert config["perturbation"] == vars(used)


def test_a_table_of_errors_reaches_the_boxes_and_stays_that_of_the_run(
    toy_slices, tmp_path, fails, monkeypatch
):
    table, drawn = tmp_path / "errors.csv", []
    table.write_text("protocol,patient,size,left,top,right,bottom\nmine,1,50,0.25,0,0,0\n")
    monkeypatch.setattr(perturb, "MEASURED_TIGHT", 0.0)
    work = ("--work-dir", tmp_path, "--run", "own")
    data = (*work, "--data", toy_slices, "--epochs", 1, "--device", "cpu", "--errors", table)
    assert "requires --policy measured" in fails(train_adaptive, *data)
    with monkeypatch.context() as patch:
        before(patch, "utils.training.batches.perturb", lambda *args: drawn.append(args))
        call(train_adaptive, *data, "--policy", "none,measured")
    for policy, digest in (("none", None), ("measured", files.sha256(table))):
        config = files.read_json(tmp_path / "own" / policy / "config.json")
        assert config["perturbation"]["errors"] == digest
        assert config["options"]["errors"] == str(table)
    boxes, areas, rng, perturbation = drawn[-1]
    outward = (perturb.perturb(boxes, areas, rng, perturbation) - boxes) * [-1, -1, 1, 1]
    width = perturb.box_sides(boxes)[:, :1]
    assert outward == pytest.approx(width * [0.25, 0, 0, 0], abs=1e-3)
    # A run of another policy of these goes on alone, and the table may not change.
    call(train_adaptive, "--work-dir", tmp_path / "own", "--run", "none", "--resume")
    table.write_text(table.read_text() + "mine,1,60,0,0,0,0\n")
    assert "the table of errors changed" in fails(train_adaptive, *work, "--resume")
    table.write_text("nothing")
    assert f"{table}: expected columns" in fails(train_adaptive, *work, "--resume")


def test_validation_boxes_do_not_depend_on_epoch_policy_or_seed(recorded, finished):
    validations = np.array(recorded.validation).reshape(1 + EPOCHS, -1)
    assert (validations == validations[0]).all()
    one, other = (results(folder)["log"] for folder in (recorded.folder, finished))
    assert one[0] == other[0] and one[1] != other[1]  # before training, and after an epoch


def test_several_policies_differ_in_their_boxes_alone(finished, toy_slices, tmp_path, monkeypatch):
    """Also if interrupted in the second policy and resumed with more epochs, of the first too."""
    work = ("--work-dir", tmp_path, "--run", "ablation")
    policies = ("medsam", "adaptive")

    def stop_in_the_second(*args):
        if args[-1].policy == policies[1]:
            raise KeyboardInterrupt

    start = ("--data", toy_slices, "--epochs", "1", "--device", "cpu")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before(patch, "utils.training.batches.perturb", stop_in_the_second)
        call(train_adaptive, *work, *start, "--policy", ",".join(policies))
    outer, first, second = (tmp_path / "ablation" / name for name in ("", *policies))
    log = results(first)["log"]
    call(train_adaptive, *work, "--resume", "--epochs", EPOCHS)
    assert_same(results(second), results(finished))
    assert len(log) == 2 and results(first)["log"][:2] == log
    assert len(results(first)["log"]) == 1 + EPOCHS and log[0] == results(finished)["log"][0]
    configs = [files.read_json(folder / "config.json") for folder in (outer, first, second)]
    for config in configs:
        assert config["options"]["epochs"] == EPOCHS
        assert [each["changes"] for each in config.pop("resumed")] == [{"epochs": [1, EPOCHS]}]
    _, a, b = configs
    assert a["options"].pop("policy") == "medsam" and b["options"].pop("policy") == "adaptive"
    assert a.pop("perturbation")["policy"] != b.pop("perturbation")["policy"]
    assert a == b


@pytest.mark.parametrize(
    ("name", "call_number", "saved", "read_ahead", "ema"),
    [
        # Before the first checkpoint, in either epoch; reading ahead in threads, and with --ema.
        ("train_adaptive.training_boxes", 1, False, 0, 0.0),
        ("train_adaptive.training_boxes", 2, True, 0, 0.0),
        ("train_adaptive.training_boxes", 7, True, 2, 0.0),
        ("train_adaptive.training_boxes", 7, True, 0, EMA),
        # Before training, and between the writes of the first epoch: decoder, checkpoint, log.
        ("utils.model.checkpoints.atomic_write", 1, False, 0, 0.0),
        ("utils.training.log.atomic_write", 1, False, 0, 0.0),
        ("utils.model.checkpoints.atomic_write", 2, False, 0, 0.0),
        ("utils.model.checkpoints.atomic_write", 3, False, 0, 0.0),
        ("utils.training.log.atomic_write", 2, True, 0, 0.0),
    ],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    finished, smoothed, toy_slices, tmp_path, monkeypatch, name, call_number, saved, read_ahead, ema
):
    ahead = partial(prefetch, depth=read_ahead, threads=2)
    monkeypatch.setattr(train_adaptive, "prefetch", lambda *args: ahead(*args[:2]))
    if name == "train_adaptive.training_boxes":
        monkeypatch.setattr(train_adaptive, "SAVE_SECONDS", -1)  # a checkpoint after every step
    folder = tmp_path / "work" / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before(patch, name, interrupt, call_number)
        train(options_for(toy_slices, ema=ema), folder)
    assert (folder / "checkpoint_last.pth").exists() == saved
    torch.manual_seed(12345)  # nothing may depend on what ran before
    call(train_adaptive, "--work-dir", tmp_path / "work", "--run", "run", "--resume")
    assert_same(results(folder), results(smoothed if ema else finished))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("name", "position"),
    [("train_adaptive.chunks", (1, 3)), ("utils.training.validation.dsc_on_device", (1, 4))],
)
def test_signal_saves_at_once_what_no_checkpoint_has_yet(
    finished, toy_slices, tmp_path, monkeypatch, name, position
):
    """In the third step, and in the first validation after it."""
    before(monkeypatch, name, lambda *_: os.kill(os.getpid(), signal.SIGTERM), 3)
    where = "stopped at epoch {}, step {}, and saved".format(*position)
    with pytest.raises(Interrupted, match=where):
        train(options_for(toy_slices), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert (last["progress"]["epoch"], last["progress"]["step"]) == position
    train(options_for(toy_slices, resume=True), tmp_path / "run")
    assert_same(results(tmp_path / "run"), results(finished))


def made_up_validation(monkeypatch, losses: list[float | None]) -> None:
    """Let validation find these losses, one after another; at None it is interrupted."""
    scores = dict.fromkeys(("dsc_standard", "dsc_expansion", "dsc_shrink"), 0.5)
    following = iter(losses)

    def made_up(*_):
        loss = next(following)
        if loss is None:
            raise KeyboardInterrupt
        return {"val_loss": loss, **scores}

    monkeypatch.setattr(train_adaptive, "validate", made_up)


def test_run_that_gets_no_better_keeps_the_weights_it_started_from(
    toy_slices, tmp_path, monkeypatch, capsys
):
    made_up_validation(monkeypatch, [0.5, 0.5])
    train(options_for(toy_slices, epochs=1, lr=0.01), tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("never fell below that of the starting weights") == 1
    (run,) = runs.find_runs([tmp_path / "run"])
    assert (run.best_epoch, run.epochs) == (0, 1)
    kept = load_model("lite_medsam", run.decoder, "cpu").mask_decoder.state_dict()
    start = load_model("lite_medsam", None, "cpu").mask_decoder.state_dict()
    assert_same_weights(kept, start)


def test_moving_average_is_what_is_validated_and_kept(finished, smoothed):
    """Training itself goes on as without it, and a validation leaves no trace in it."""
    plain, averaged = (results(folder) for folder in (finished, smoothed))
    for row, other in zip(plain["log"][1:], averaged["log"][1:], strict=True):
        assert row["train_loss"] == other["train_loss"] and row["val_loss"] != other["val_loss"]
    assert_same_weights(averaged["last"], plain["last"])
    losses = [float(row["val_loss"]) for row in averaged["log"]]
    assert losses.index(min(losses)) == EPOCHS  # the best epoch is the last
    state = torch.load(smoothed / "checkpoint_last.pth", weights_only=True)["ema"]
    assert state["n_averaged"] == 4 * EPOCHS
    assert_same_weights(state, averaged["best"], "module.")


def test_scheduler_best_decoder_and_weight_decay(toy_slices, tmp_path, monkeypatch):
    """With a validation loss that falls once and rises then, stopped and resumed in between."""
    made_up_validation(monkeypatch, [0.9, 0.5, 0.6, None])  # before training, epochs 1, 2, 3
    monkeypatch.setattr(train_adaptive, "PLATEAU_PATIENCE", 1)
    options, folder = options_for(toy_slices, epochs=4, weight_decay=0.25), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options, folder)
    made_up_validation(monkeypatch, [0.7, 0.8])  # epochs 3, 4
    train(options_for(toy_slices, epochs=4, weight_decay=0.25, resume=True), folder)
    # Two epochs without improvement are one more than the patience: the rate drops after epoch 3.
    rates = [float(row["lr"]) for row in results(folder)["log"]]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 1e-5])
    best = torch.load(folder / "decoder_best.pth", weights_only=True)
    assert best["notes"]["epoch"] == 1 and best["model"] == "lite_medsam"
    last = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_mixed_precision_trains_close_to_fp32(finished, toy_slices, tmp_path):
    train(options_for(toy_slices, amp="bf16", epochs=1), tmp_path / "run")
    found, expected = (results(f)["log"][1] for f in (tmp_path / "run", finished))
    assert float(found["val_loss"]) == pytest.approx(float(expected["val_loss"]), rel=0.2)
    assert found["val_loss"] != expected["val_loss"]  # it was bf16


def test_boxes_padded_for_cuda_graphs_train_alike(finished, toy_slices, tmp_path, monkeypatch):
    calls = []

    def graphed(*args):  # the module itself in the place of its graph, which needs a GPU
        return GraphedDecoder(*args, lambda module, inputs: calls.append(1) or module)

    monkeypatch.setattr(train_adaptive, "GraphedDecoder", graphed)
    train(options_for(toy_slices, cuda_graphs=True, epochs=1), tmp_path / "run")
    found, expected = (results(f)["log"][1] for f in (tmp_path / "run", finished))
    assert calls
    for name in ("train_loss", "val_loss"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4)


def test_two_data_sets_train_together(toy_slices, tmp_path):
    other = copy_slices(toy_slices, tmp_path / "other", lambda meta: meta.update(name="other"))
    data = [str(other), str(toy_slices)]
    options = options_for(toy_slices, epochs=1)
    train(Namespace(**{**vars(options), "data": data}), tmp_path / "run")
    config = files.read_json(tmp_path / "run" / "config.json")
    assert set(config["data"]) == {"toy", "other"}
    last = torch.load(tmp_path / "run" / "checkpoint_last.pth", weights_only=True)
    steps = {int(state["step"]) for state in last["optimizer"]["state"].values()}
    assert steps == {8}  # four slices of each


def test_resume_is_refused(fails, finished, fresh_slices, tmp_path, monkeypatch):
    def message(*words: object) -> str:
        return fails(train_adaptive, "--work-dir", finished.parent, *words)

    assert "nothing to resume" in message("--run", "typo", "--resume")
    assert "already exists" in message("--run", "finished", "--data", fresh_slices)
    edit_json(fresh_slices / "dataset.json", lambda meta: meta.update(min_pixels=1))
    resume = ("--run", "finished", "--resume")
    config = finished / "config.json"
    content = config.read_bytes()
    for words, expected in (
        (("--lr", "0.5"), "was started with --lr 0.0001, not 0.5"),
        (("--reading", "area"), "--reading width, not area"),
        (("--ema",), "--ema 0.0, not 0.998"),
        (("--loss-resolution", 1024), "--loss-resolution 256, not 1024"),
        (("--epochs", 1), "--epochs 1: already finished 2"),
        (("--amp", "bf16"), "amp is torch.bfloat16, was off"),
        (("--data", fresh_slices), "data changed"),
    ):
        assert expected in message(*resume, *words)
    (tmp_path / "perturb.py").write_text(Path(perturb.__file__).read_text() + "# edited")
    with monkeypatch.context() as patch:
        patch.setattr(perturb, "__file__", str(tmp_path / "perturb.py"))
        changed = f"perturb.py changed since the run was started, see {finished / 'perturb.py'}"
        assert changed in message(*resume)
    assert config.read_bytes() == content
    for change, expected in (
        (lambda config: config["options"].pop("lr"), "its options are of another version"),
        (lambda config: config.update(options=[]), "not from a run that can be resumed"),
    ):
        edit_json(config, change)
        assert expected in message(*resume)
        config.write_bytes(content)


def test_finished_run_goes_on_with_more_epochs_on_data_that_was_moved(
    fails, finished, toy_slices, tmp_path, capfd
):
    """With the cache in another folder; as if it had been started so, bit for bit."""
    data, moved, cache = tmp_path / "toy", tmp_path / "disk" / "renamed", tmp_path / "cache"
    shutil.copytree(toy_slices, data)
    train(options_for(data, epochs=1), tmp_path / "run")
    moved.parent.mkdir()
    data.rename(moved)
    (moved / "embeddings").rename(cache)
    resume = ["--work-dir", tmp_path, "--run", "run", "--resume", "--epochs", EPOCHS]
    message = fails(train_adaptive, *resume)
    assert message.endswith(f"its data {data} is gone; give the new path with --data")
    call(train_adaptive, *resume, "--data", moved, "--cache-dir", cache)
    hint = f"next: python eval.py --runs {tmp_path / 'run'} --cache-dir {cache}\n"
    assert capfd.readouterr().out.endswith(hint) and not (moved / "embeddings").exists()
    assert_same(results(tmp_path / "run"), results(finished))
    config = files.read_json(tmp_path / "run" / "config.json")
    assert config["options"]["data"] == [str(moved)] and set(config["data"]) == {"toy"}
    (entry,) = config["resumed"]
    assert entry["changes"] == {
        "epochs": [1, EPOCHS],
        "data": [[str(data)], [str(moved)]],
        "cache_dir": [None, str(cache)],
    }


def test_resume_records_what_changes_no_result(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    edit_json(path, lambda config: config["versions"].update(torch="0.1"))
    edit_json(path, lambda config: config.update(git_commit="same"))
    edit_json(path, lambda config: config.pop("resumed", None))
    monkeypatch.setattr(runs, "git_commit", lambda: "same")
    resume = ["--work-dir", tmp_path, "--run", "run", "--resume"]
    free = ["--boxes-per-call", "4", "--cache", "off", "--amp", "off"]
    for options in (free, []):
        call(train_adaptive, *resume, *options)
    config = files.read_json(path)
    first, second = config["resumed"]
    changes = {"boxes_per_call": [16, 4], "cache": ["on", "off"], "amp": ["auto", "off"]}
    assert (first["changes"], second["changes"]) == (changes, {})
    assert first["versions"] == runs.versions() and first["git_commit"] == "same"
    assert config["versions"]["torch"] == "0.1" and config["options"]["boxes_per_call"] == 4
    assert_same(results(tmp_path / "run"), results(finished))


@pytest.mark.parametrize("policy", ["adaptive", "medsam,adaptive"])
def test_run_that_failed_before_training_does_not_block_its_name(
    fails, finished, toy_slices, tmp_path, monkeypatch, policy
):
    def full(*_, **__):
        raise UserError("the disk is full")

    monkeypatch.setattr(train_adaptive, "Embeddings", full)
    work = ("--work-dir", tmp_path, "--run", "r")
    new = (*work, "--data", toy_slices, "--device", "cpu")
    first = tmp_path / "r" / ("medsam" if "," in policy else "")
    for words in ((*new, "--policy", policy, "--seed", 1), (*work, "--resume")):
        for _ in range(2):
            assert "the disk is full" in fails(train_adaptive, *words)
        shutil.copy(finished / "decoder_best.pth", first)  # of epoch 0, before log.csv is written
    assert files.read_json(first / "config.json")["options"]["seed"] == 1
    shutil.copy(finished / "log.csv", first)
    assert "already exists; continue it with --resume" in fails(train_adaptive, *new)


def test_run_started_from_a_decoder_is_not_resumed_with_another(
    fails, finished, toy_slices, tmp_path
):
    start, run = tmp_path / "start.pth", tmp_path / "work" / "r"
    shutil.copy(finished / "decoder_best.pth", start)
    train(options_for(toy_slices, checkpoint=str(start), epochs=1), run)
    best = min(float(row["val_loss"]) for row in results(finished)["log"][1:])
    assert float(results(run)["log"][0]["val_loss"]) == pytest.approx(best, rel=1e-4)
    torch.save(torch.load(start, weights_only=True) | {"notes": {"epoch": 9}}, start)
    message = fails(train_adaptive, "--work-dir", run.parent, "--run", "r", "--resume")
    assert "start weights changed" in message


@pytest.mark.parametrize("policy", ["", "--policy medsam,adaptive"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "--data: give the folder"),
        ("--resume", "--run: give its name"),
        ("--data nowhere", "no such folder"),
        ("--data DATA DATA", "are both named"),
        ("--demo --data DATA", "--demo: makes its own data"),
        ("--data DATA --delta-expand -5", "delta_expand must be >= 0"),
        ("--data DATA --epsilon-shrink 5", "epsilon_shrink must be <= 0"),
        ("--data DATA --epochs 0", "--epochs: expected a whole number, 1 or more"),
        ("--data DATA --policy medsam,medsam", "names a policy twice"),
        ("--data DATA --policy best", "unknown policy 'best'; choose from none, medsam"),
        ("--data DATA --model unet", "unknown model 'unet'"),
        ("--data DATA --model sam_vit_b", "sam_vit_b needs its weights"),
        ("--data DATA --checkpoint no.pth", "no such checkpoint"),
        ("--data DATA --device cuda:99", "PyTorch does not see that GPU"),
        ("--data DATA --amp fp16 --device cpu", "--amp fp16 needs a GPU"),
        ("--data DATA --cuda-graphs --device cpu", "--cuda-graphs: needs a GPU"),
        ("--data DATA --run ../x", "--run: expected a name, not a path"),
        ("--data DATA --cache off --cache-dir x", "--cache-dir: has no effect with --cache"),
    ],
)
def test_bad_options_leave_nothing_behind(fails, toy_slices, tmp_path, arguments, expected, policy):
    words = [str(toy_slices) if word == "DATA" else word for word in arguments.split()]
    work = ("--work-dir", tmp_path / "work", *policy.split())
    assert expected in fails(train_adaptive, *work, *words)
    assert not (tmp_path / "work").exists()


def test_options_of_0_are_read_again_from_a_run(toy_slices, tmp_path):
    zeros = ("--weight-decay", "0", "--delta-expand", "0", "--epsilon-shrink", "0", "--ema", "0")
    where = ("--work-dir", str(tmp_path), "--run", "run")
    options = parse_options(["--data", str(toy_slices), *zeros, *where])
    runs.start_or_resume(tmp_path / "run", options, {})
    again = parse_options([*where, "--resume"])
    assert vars(again) == {**vars(options), "resume": True}


@pytest.mark.parametrize("by_option", [True, False])
def test_a_factor_out_of_bounds_is_reported(tmp_path, monkeypatch, capsys, by_option):
    bound = perturb.DELTA_EXPAND_MAX
    option = ("--delta-expand", bound + 1) if by_option else ()
    monkeypatch.setattr(perturb, "DELTA_EXPAND", perturb.DELTA_EXPAND if by_option else bound + 1)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        call(train_adaptive, "--data", "nowhere", *option, "--work-dir", tmp_path)
    message = f"adaptive: delta_expand {bound + 1:g} px is out of bounds: clamped to {bound:g} px"
    assert capsys.readouterr().out.splitlines() == [message]


def test_one_data_set_can_validate_for_another(toy_slices, tmp_path):
    both = open_dataset(toy_slices)
    train, val = (
        open_dataset(copy_slices(toy_slices, tmp_path / split, partial(all_in_split, split)))
        for split in ("train", "val")
    )
    found = train_adaptive.split_slices([train, both], "val")
    assert {sample.folder for sample in found} == {toy_slices} and len(found) == 2
    with pytest.raises(UserError, match="val: no slice in the train split"):
        train_adaptive.split_slices([both, val], "train")


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_run(fails, toy_slices, tmp_path, monkeypatch, loss):
    factors = iter([1, 1, loss, *[1] * 100])
    monkeypatch.setattr(
        train_adaptive, "segmentation_loss", lambda *args: segmentation_loss(*args) * next(factors)
    )
    monkeypatch.setattr(train_adaptive, "CHECK_SECONDS", 0)
    work = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu")
    message = fails(train_adaptive, *work, "--epochs", EPOCHS)
    expected = f"the loss is {loss} in epoch 1, by step 3; start a new run with a smaller --lr"
    assert expected in message
    assert not (tmp_path / "r" / "checkpoint_last.pth").exists()


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_no_step_waits_for_the_device(toy_slices, tmp_path, monkeypatch, amp):
    """From the chunks to the weights' moving average: nothing asks a tensor for its value."""
    waits = Waits()

    def start(*args):
        waits.__enter__()
        return chunks(*args)

    def stop(self):
        waits.__exit__(None, None, None)
        return 0, False, False

    monkeypatch.setattr(train_adaptive, "chunks", start)
    monkeypatch.setattr(train_adaptive.Intervals, "due", stop)
    monkeypatch.setattr(train_adaptive, "mixed_precision", lambda *_: amp)
    train(options_for(toy_slices, epochs=1, boxes_per_call=1), tmp_path / "run")
    assert waits.count == 0
    with waits:
        torch.zeros(1).item()
    assert waits.count == 1  # the counter counts


class Waits(TorchFunctionMode):
    """Counts what a GPU would have to be waited for: a tensor's value asked for by Python."""

    NAMES = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"}
    NAMES |= {"__index__", "argwhere", "masked_select", "unique", "equal", "allclose"}
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


def test_everything_is_brought_to_the_gpu(toy_slices):
    """Tensors without storage that claim to be on a GPU: meeting one on the CPU is an error."""
    model = load_model("lite_medsam", None, "cpu")
    entry = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(np.load(entry.image_path))[None]
    tight, areas, targets = TargetStore(1024).get(entry)

    class Given:
        def embed(self, loaded, slices):
            return embedding

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, value in [*module.named_parameters(recurse=False)]:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake, value.requires_grad))
            for name, value in [*module.named_buffers(recurse=False)]:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                setattr(module, name, fake)
        embedding = model.encode(image, [entry.frame])
        batch = Batch([entry], [tight], [areas], [torch.from_numpy(targets)], [None])
        (chunk,) = chunks(batch, [tight], Given(), 16)
        decode = GraphedDecoder(model, 2, torch.float16, lambda module, inputs: module)
        logits = decode(chunk.embeddings, chunk.boxes)
        losses = segmentation_loss(logits, chunk.targets)
        masks = logits_to_native(logits, entry.frame)
        assert {each.device.type for each in (chunk.targets, losses, masks)} == {"cuda"}
        with pytest.raises(RuntimeError, match="same device"):
            segmentation_loss(logits, torch.from_numpy(targets))


def test_out_of_memory_names_what_helps(fails, toy_slices, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train_adaptive, "chunks", full)
    options = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu")
    message = fails(train_adaptive, *options, "--loss-resolution", "1024")
    assert "out of memory: go on with --resume and fewer --boxes-per-call, or start a" in message


def test_deterministic_algorithms_and_no_cache_give_the_same_bits_on_a_cpu(
    finished, toy_slices, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    words = ("--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu")
    try:
        call(train_adaptive, *words, "--epochs", 1, "--deterministic", "--cache", "off")
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert f"next: python eval.py --runs {tmp_path / 'r'} --cache off\n" in capsys.readouterr().out
    assert results(tmp_path / "r")["log"] == results(finished)["log"][:2]


def test_export_of_a_run(fails, finished, toy_slices, tmp_path, capfd):
    path = tmp_path / "full.pth"
    where, export = ("--work-dir", finished.parent, "--run", finished.name), ("--export", path)
    for words, expected in (
        ((*where, "--lr", "1e-3"), "--export: cannot be used with --lr"),
        ((*where, "--data", toy_slices), "--export: cannot be used with --data"),
        ((*where, "--resume"), "not allowed with"),
        ((), "--run: give its name"),
        (("--work-dir", tmp_path, "--run", "none"), "not a run"),
    ):
        assert expected in fails(train_adaptive, *words, *export)
        assert not path.exists()
    call(train_adaptive, *where, *export)
    assert "full weights of lite_medsam" in capfd.readouterr().out
    exported = torch.load(path, weights_only=True)
    assert_same_weights(exported, results(finished)["best"], "mask_decoder.")
    assert "already exists" in fails(train_adaptive, *where, *export)


def test_tensorboard_shows_every_epoch_once(finished, toy_slices, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    for resume in (False, True):  # the second time nothing is left to do
        train(options_for(toy_slices, tensorboard=True, resume=resume), folder)
    assert_same(results(folder), results(finished))  # it only watches
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    for column in ("val_loss", "dsc_shrink", "lr"):
        shown = {event.step: event.value for event in found.Scalars(column)}
        logged = {int(row["epoch"]): float(row[column]) for row in results(folder)["log"]}
        assert shown == pytest.approx(logged, rel=1e-5) and len(found.Scalars(column)) == 1 + EPOCHS
    assert [event.step for event in found.Scalars("train_loss")] == list(range(1, EPOCHS + 1))


def test_tensorboard_that_is_not_installed(fails, toy_slices, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ("--data", toy_slices, "--work-dir", tmp_path / "w", "--tensorboard")
    assert "pip install tensorboard" in fails(train_adaptive, *options)
    assert not (tmp_path / "w").exists()
