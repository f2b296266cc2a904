"""Training with LiteMedSAM's own weights on the toy data."""

import csv
import json
import math
import os
import pkgutil
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import perturb
import train_adaptive
from tests.helpers import assert_same, edit_json, results
from train_adaptive import DEFAULTS, train
from utils.data.slices import open_dataset, read_label_map
from utils.model import checkpoints
from utils.model.checkpoints import load_state, read_checkpoint
from utils.model.segmenter import load_model
from utils.system import files
from utils.system.errors import UserError
from utils.system.prefetch import prefetch
from utils.system.signals import Interrupted
from utils.training import runs
from utils.training.batches import as_shares, load_batch, targets_of

EPOCHS = 2


def options_for(data: Path, **changes) -> dict:
    return {**DEFAULTS, "device": "cpu", "epochs": EPOCHS, "data": [str(data)], **changes}


@pytest.fixture(scope="module")
def finished(toy_slices, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(options_for(toy_slices), folder)
    return folder


def test_run_folder(finished, toy_slices):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "log.csv",
        "curves.png",
        "checkpoint_last.pth",
        "decoder_best.pth",
    }
    config = json.loads((finished / "config.json").read_text())
    assert config["options"] == options_for(toy_slices)
    assert config["constants"]["MEDSAM_SHIFT"] == 20
    assert config["data"] == {"toy": open_dataset(toy_slices).sha256}
    assert set(config["versions"]) >= {"python", "torch", "numpy"}
    log = results(finished)["log"]
    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert log[0]["train_loss"] == "nan"  # the weights before training
    assert {"val_loss", "dsc_standard", "dsc_expansion", "dsc_shrink", "lr"} <= set(log[0])


def test_training_improves_validation(finished):
    log = results(finished)["log"]
    assert float(log[-1]["val_loss"]) < float(log[0]["val_loss"])


def test_only_the_decoder_changes(finished, lite_medsam):
    trained = load_model("lite_medsam", finished / "decoder_best.pth", "cpu")
    before = lite_medsam.state_dict()
    changed = {k for k, v in trained.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(key.startswith("mask_decoder.") for key in changed)
    # All of the decoder but its IoU head, the three masks that are not asked for, and keys' biases.
    still = {k for k in before if k.startswith("mask_decoder.")} - changed
    unused = ("iou_prediction_head", "output_hypernetworks_mlps", "k_proj.bias")
    assert still and all(any(name in key for name in unused) for key in still)
    assert not any("hypernetworks_mlps.0" in key for key in still)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finished, toy_slices, tmp_path):
    train(options_for(toy_slices), tmp_path / "again")
    assert_same(results(tmp_path / "again"), results(finished))
    train(options_for(toy_slices, seed=1, epochs=1), tmp_path / "other")
    assert results(tmp_path / "other")["log"][1] != results(finished)["log"][1]


def test_several_policies_differ_in_their_boxes_alone(finished, toy_slices, tmp_path, monkeypatch):
    """Interrupted in the second policy and resumed, each run is the one trained alone."""
    work = ["--work-dir", str(tmp_path), "--run", "ablation"]
    policies = ("medsam", "adaptive")
    perturbed = perturb.perturb

    def stop_in_the_second(boxes, policy, *args, **kwargs):
        if policy == policies[1]:
            raise KeyboardInterrupt
        return perturbed(boxes, policy, *args, **kwargs)

    monkeypatch.setattr(perturb, "perturb", stop_in_the_second)
    start = ["--data", str(toy_slices), "--epochs", str(EPOCHS), "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        train_adaptive.main([*work, *start, "--policy", ",".join(policies)])
    monkeypatch.setattr(perturb, "perturb", perturbed)
    first = (tmp_path / "ablation" / "medsam" / "checkpoint_last.pth").read_bytes()
    train_adaptive.main([*work, "--resume"])
    assert (tmp_path / "ablation" / "medsam" / "checkpoint_last.pth").read_bytes() == first
    assert_same(results(tmp_path / "ablation" / "adaptive"), results(finished))
    a, b = (files.read_json(tmp_path / "ablation" / policy / "config.json") for policy in policies)
    assert a["options"].pop("policy") == "medsam" and b["options"].pop("policy") == "adaptive"
    assert a == b
    assert results(tmp_path / "ablation" / "medsam")["log"][0] == results(finished)["log"][0]


@pytest.mark.parametrize(("stop_after", "depth"), [(0, 0), (1, 0), (6, 0), (6, 2)])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    finished, toy_slices, tmp_path, monkeypatch, stop_after, depth
):
    """Stopped before the first checkpoint, in the first epoch, and in the second; reading ahead in
    another thread, as for a GPU, as well."""
    monkeypatch.setattr(
        "utils.system.prefetch.prefetch", lambda f, items, _: prefetch(f, items, depth)
    )
    monkeypatch.setattr(train_adaptive, "SAVE_SECONDS", -1)  # a checkpoint after every step
    steps = 0
    perturbed = perturb.perturb

    def stop(*args, **kwargs):
        nonlocal steps
        if steps == stop_after:
            raise KeyboardInterrupt
        steps += 1
        return perturbed(*args, **kwargs)

    monkeypatch.setattr(perturb, "perturb", stop)
    folder = tmp_path / "work" / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options_for(toy_slices), folder)
    assert (folder / "checkpoint_last.pth").exists() == (stop_after > 0)
    monkeypatch.setattr(perturb, "perturb", perturbed)
    torch.manual_seed(12345)  # nothing may depend on what ran before
    train_adaptive.main(["--work-dir", str(tmp_path / "work"), "--run", "run", "--resume"])
    assert_same(results(folder), results(finished))


@pytest.mark.parametrize(
    ("write", "time"),
    [("log.csv", 1), ("decoder_best.pth", 1), ("checkpoint_last.pth", 1), ("log.csv", 2)],
)
def test_run_stopped_between_two_writes_goes_on_the_same(
    finished, toy_slices, tmp_path, monkeypatch, write, time
):
    atomic_write, writes = files.atomic_write, []

    def stop(path, mode="wb"):
        writes.append(Path(path).name)
        if writes[-1] == write and writes.count(write) == time:
            raise KeyboardInterrupt
        return atomic_write(path, mode)

    for module in (checkpoints, runs):
        monkeypatch.setattr(module, "atomic_write", stop)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options_for(toy_slices), folder)
    for module in (checkpoints, runs):
        monkeypatch.setattr(module, "atomic_write", atomic_write)
    train(options_for(toy_slices), folder, resume=True)
    assert_same(results(folder), results(finished))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("owner", "name", "call", "at"),
    [
        ("utils.training.trainer.Trainer", "step", 3, (1, 3)),
        ("utils.training.trainer", "dsc_of", 3, (1, 4)),
    ],
)
def test_signal_saves_at_once_what_no_checkpoint_has_yet(
    finished, toy_slices, tmp_path, monkeypatch, owner, name, call, at
):
    """In the third step, and in the first validation after it."""
    function, calls = pkgutil.resolve_name(f"{owner}.{name}"), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(f"{owner}.{name}", interrupted)
    with pytest.raises(Interrupted, match=f"stopped at epoch {at[0]}, step {at[1]}, and saved"):
        train(options_for(toy_slices), tmp_path / "run")
    last = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert (last["at"]["epoch"], last["at"]["step"]) == at
    train(options_for(toy_slices), tmp_path / "run", resume=True)
    assert_same(results(tmp_path / "run"), results(finished))


def test_scheduler_best_decoder_and_weight_decay(toy_slices, tmp_path, monkeypatch):
    """With a validation loss that falls once and rises then, stopped and resumed in between."""
    losses = iter([0.9, 0.5, 0.6, None, 0.7])  # before training, epochs 1, 2, (stop), 3
    scores = dict.fromkeys(("dsc_standard", "dsc_expansion", "dsc_shrink"), 0.5)

    def made_up(*_):
        loss = next(losses)
        if loss is None:
            raise KeyboardInterrupt
        return {"val_loss": loss, **scores}

    monkeypatch.setattr(train_adaptive, "validate", made_up)
    monkeypatch.setattr(train_adaptive, "PLATEAU_PATIENCE", 1)
    options, folder = options_for(toy_slices, epochs=4, weight_decay=0.25), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options, folder)
    losses = iter([0.7, 0.8])
    train(options, folder, resume=True)
    # Two epochs without improvement are one more than the patience: the rate drops after epoch 3.
    rates = [float(row["lr"]) for row in results(folder)["log"]]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-4, 1e-5])
    best = torch.load(folder / "decoder_best.pth", weights_only=True)
    assert best["notes"]["epoch"] == 1 and best["model"] == "lite_medsam"
    last = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


def test_overfitting_a_handful_of_slices_drives_the_loss_down(lite_medsam, toy_slices):
    """The gradient reaches the decoder through boxes, embedding and loss."""
    from utils.training.losses import segmentation_loss

    model = load_model("lite_medsam", None, "cpu")
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=3e-4)
    entry = open_dataset(toy_slices).split("train")[0]
    image = torch.from_numpy(np.load(entry.image_path))
    embedding = lite_medsam.encode(image[None], [entry.frame])[0]
    boxes, targets = targets_of(entry, 256)
    targets = as_shares(torch.from_numpy(targets))
    losses = []
    for _ in range(15):
        loss = segmentation_loss(model.decode(embedding, boxes), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_targets_are_the_share_of_each_decoder_pixel(toy_slices):
    entry = open_dataset(toy_slices).split("train")[0]
    boxes, targets = targets_of(entry, 256)
    targets = as_shares(torch.from_numpy(targets))
    label_map = read_label_map(entry.label_path)
    assert targets.shape == (2, 256, 256) and targets.dtype == torch.float32
    for label, box, target in zip((1, 2), boxes, targets, strict=True):
        assert target.sum().item() * 16 == (label_map == label).sum()
        assert target[40, 50] == (label_map[160:164, 200:204] == label).mean()
        x0, y0, x1, y1 = (box // 4).astype(int)
        assert not target[: y0 - 1].any() and not target[:, x1 + 2 :].any()


@pytest.mark.parametrize(
    ("answer", "score"),
    [(lambda target: target >= 0.5, 1.0), (lambda target: target < 0, 0.0)],
    ids=["target", "nothing"],
)
def test_validation_scores_of_models_with_known_answers(toy_slices, answer, score):
    class Nothing:
        load = staticmethod(lambda entry: None)

    class KnownAnswer:
        device, read_ahead = torch.device("cpu"), 0

        def load(self, entries, resolution, prompt):
            return load_batch(entries, Nothing, resolution, prompt)

        def predict(self, batch):
            targets = as_shares(torch.cat(batch.targets))
            return 20 * answer(targets).float() - 10, targets

    slices = open_dataset(toy_slices).split("val")
    row = train_adaptive.validate(KnownAnswer(), slices, 256)
    assert [row[f"dsc_{kind}"] for kind in perturb.BOX_KINDS] == [score] * 3
    assert (row["val_loss"] < 0.3) == (score == 1)  # pixels covered in part cost a little


def test_validation_boxes_do_not_depend_on_epoch_policy_or_seed(toy_slices, monkeypatch, tmp_path):
    seen = []
    shift = perturb.shift_boxes

    def record(*args, **kwargs):
        seen.append(shift(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(perturb, "shift_boxes", record)
    train(options_for(toy_slices, epochs=1), tmp_path / "a")
    train(options_for(toy_slices, epochs=1, policy="medsam", seed=5), tmp_path / "b")
    per_validation = 2 * 3  # slices, kinds of box
    assert len(seen) == 4 * per_validation
    for start in range(0, len(seen), per_validation):
        for first, other in zip(seen[:per_validation], seen[start:], strict=False):
            assert (first == other).all()


def test_policy_and_factors_reach_the_boxes(toy_slices, monkeypatch, tmp_path):
    calls = []
    perturbed = perturb.perturb

    def record(boxes, policy, rng, **kwargs):
        calls.append((policy, kwargs))
        return perturbed(boxes, policy, rng, **kwargs)

    monkeypatch.setattr(perturb, "perturb", record)
    changes = {"policy": "scaled", "delta_expand": 500.0, "epsilon_shrink": -50.0, "epochs": 1}
    train(options_for(toy_slices, **changes), tmp_path / "run")
    assert calls == [("scaled", {"delta_expand": 256.0, "epsilon_shrink": -50.0})] * len(calls)
    assert len(calls) == 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["delta_expand"] == 500
    assert config["constants"]["delta_expand_used"] == 256


def test_mixed_precision_trains_close_to_fp32(finished, toy_slices, tmp_path):
    train(options_for(toy_slices, amp="bf16", epochs=1), tmp_path / "run")
    found, expected = (results(f)["log"][1] for f in (tmp_path / "run", finished))
    assert float(found["val_loss"]) == pytest.approx(float(expected["val_loss"]), rel=0.2)
    assert found["val_loss"] != expected["val_loss"]  # it was bf16


def test_two_data_sets_train_together(toy_slices, tmp_path):
    shutil.copytree(toy_slices, tmp_path / "other")
    options = options_for(toy_slices, epochs=1)
    options["data"].append(str(tmp_path / "other"))
    train(options, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(config["data"]) == {"toy", "other"}
    last = torch.load(tmp_path / "run" / "checkpoint_last.pth", weights_only=True)
    steps = {int(state["step"]) for state in last["optimizer"]["state"].values()}
    assert steps == {8}  # four slices of each


def test_starting_from_a_decoder_file(finished, toy_slices, tmp_path):
    start = str(finished / "decoder_best.pth")
    train(options_for(toy_slices, checkpoint=start, epochs=1), tmp_path / "run")
    best = min(float(row["val_loss"]) for row in results(finished)["log"][1:])
    assert float(results(tmp_path / "run")["log"][0]["val_loss"]) == pytest.approx(best, rel=1e-4)


# --- The command line ----------------------------------------------------------------------------
def test_finished_run_is_left_as_it_is(finished, capsys):
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.suffix == ".pth"}
    work = ["--work-dir", str(finished.parent), "--run", "finished"]
    train_adaptive.main([*work, "--resume", "--epochs", str(EPOCHS)])
    assert "next: python eval.py" in capsys.readouterr().out
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_resume_is_refused(fails, finished, toy_slices, tmp_path):
    work = ["--work-dir", finished.parent]
    start = train_adaptive.main
    assert "nothing to resume" in fails(start, *work, "--run", "typo", "--resume")
    assert "say which run" in fails(start, *work, "--resume")
    message = fails(start, *work, "--run", "finished", "--resume", "--lr", "0.5")
    assert "was started with --lr 0.0001, not 0.5" in message
    message = fails(start, *work, "--run", "finished", "--resume", "--data", tmp_path)
    assert "was started with --data" in message
    message = fails(start, *work, "--run", "finished", "--data", toy_slices)
    assert "already exists" in message


def test_resume_is_refused_when_the_constants_changed(fails, finished, monkeypatch):
    work = ["--work-dir", finished.parent, "--run", "finished", "--resume"]
    monkeypatch.setattr(perturb, "MEDSAM_SHIFT", 10.0)
    assert "constants changed" in fails(train_adaptive.main, *work)


def test_resume_is_refused_when_the_data_or_the_starting_weights_changed(
    fails, finished, toy_slices, tmp_path
):
    data, start = tmp_path / "toy", tmp_path / "start.pth"
    shutil.copytree(toy_slices, data)
    shutil.copy(finished / "decoder_best.pth", start)
    work = ["--work-dir", tmp_path / "work", "--run", "r"]
    train(options_for(data, checkpoint=str(start), epochs=1), tmp_path / "work" / "r")
    shutil.copy(finished / "decoder_best.pth", tmp_path / "kept.pth")
    content = torch.load(start, weights_only=True)
    torch.save(content | {"notes": {"epoch": 9}}, start)
    assert "start weights changed" in fails(train_adaptive.main, *work, "--resume")
    shutil.copy(tmp_path / "kept.pth", start)
    edit_json(data / "dataset.json", lambda meta: meta.update(min_pixels=1))
    assert "data changed" in fails(train_adaptive.main, *work, "--resume")


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("config.json", lambda config: config["options"].pop("lr"), "not the options of this"),
        ("config.json", lambda config: config["options"].update(epochs="x"), "--epochs: must be"),
        ("config.json", lambda config: config.update(options=[]), "not the configuration of a run"),
        ("checkpoint_last.pth", lambda state: state.pop("optimizer"), "not a checkpoint of this"),
        ("checkpoint_last.pth", None, "damaged or not a checkpoint"),
    ],
)
def test_damaged_run_is_named(fails, finished, tmp_path, name, change, expected):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    path = folder / name
    if change is None:
        path.write_bytes(path.read_bytes()[:-1000])
    elif path.suffix == ".json":
        edit_json(path, change)
    else:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    message = fails(train_adaptive.main, "--work-dir", tmp_path, "--run", "copy", "--resume")
    assert expected in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data: give the folder"),
        (["--data", "nowhere"], "no such folder"),
        (["--data", "DATA", "--epochs", "0"], "--epochs: must be from 1"),
        (["--data", "DATA", "--lr", "-1"], "--lr: must be from 1e-12 to 1"),
        (["--data", "DATA", "--seed", "99999999999999999999"], "--seed: must be from 0"),
        (["--data", "DATA", "--device", "meta"], "unknown device"),
        (["--demo", "--delta-expand", "-5"], "delta_expand must be >= 0"),
        (["--demo", "--model", "medsam_vit_b"], "medsam_vit_b needs its weights"),
        (["--data", "DATA", "--lr", "nan"], "--lr: must be from 1e-12 to 1"),
        (["--data", "DATA", "--weight-decay", "-0.1"], "--weight-decay: must be from 0 to 1"),
        (["--data", "DATA", "--policy", "medsam,medsam"], "names a policy twice"),
        (["--data", "DATA", "--policy", "best"], "unknown policy 'best'; choose from none, medsam"),
        (["--data", "DATA", "--model", "unet"], "unknown model 'unet'"),
        (["--data", "DATA", "--model", "sam_vit_b"], "sam_vit_b needs its weights"),
        (["--data", "DATA", "--checkpoint", "no.pth"], "no such checkpoint"),
        (["--data", "DATA", "--delta-expand", "-5"], "delta_expand must be >= 0"),
        (["--data", "DATA", "--epsilon-shrink", "5"], "epsilon_shrink must be <= 0"),
        (["--data", "DATA", "--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
        (["--data", "DATA", "--device", "cuda:99"], "PyTorch does not see that GPU"),
        (["--data", "DATA", "--device", "toaster"], "unknown device"),
        (["--data", "DATA", "--run", "../x"], "--run: a name, not a path"),
        (["--data", "DATA", "DATA"], "two folders are named"),
        (["--demo", "--data", "DATA"], "--demo makes its own data"),
    ],
)
def test_bad_options_leave_nothing_behind(fails, toy_slices, tmp_path, arguments, expected):
    arguments = [str(toy_slices) if word == "DATA" else word for word in arguments]
    message = fails(train_adaptive.main, "--work-dir", tmp_path / "work", *arguments)
    assert expected in message
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "nowhere"],
        ["--data", "DATA", "--device", "cuda:99"],
        ["--data", "DATA", "--checkpoint", "no.pth"],
        ["--data", "DATA", "--delta-expand", "inf"],
    ],
)
def test_bad_options_of_several_policies_leave_nothing_behind(
    fails, toy_slices, tmp_path, arguments
):
    arguments = [str(toy_slices) if word == "DATA" else word for word in arguments]
    work = ("--work-dir", tmp_path / "work", "--run", "r", "--policy", "medsam,adaptive")
    fails(train_adaptive.main, *work, *arguments)
    assert not (tmp_path / "work").exists()


def test_data_without_a_split_is_named(fails, toy_volumes, tmp_path):
    from preprocess_ct import preprocess

    where = (toy_volumes / "images", toy_volumes / "labels", tmp_path / "all")
    preprocess(*where, split=(1, 0, 0), workers=1)
    message = fails(train_adaptive.main, "--data", tmp_path / "all", "--work-dir", tmp_path / "w")
    assert "no slice in the val split" in message and not (tmp_path / "w").exists()


def test_one_data_set_can_validate_for_another(toy_slices, toy_volumes, tmp_path):
    """But each has to have something to train on."""
    from preprocess_ct import preprocess

    for name, split in (("all_train", (1, 0, 0)), ("all_val", (0, 1, 0))):
        out = tmp_path / name
        preprocess(toy_volumes / "images", toy_volumes / "labels", out, split=split, workers=1)
        # Other patients than the toy ones, which would be in two splits otherwise.
        edit_json(
            out / "dataset.json",
            lambda meta: [
                entry.update(image_sha256=f"{number:064x}")
                for number, entry in enumerate(meta["cases"].values())
            ],
        )
    options = options_for(toy_slices)
    prepared = train_adaptive.prepare(
        options | {"data": [str(tmp_path / "all_train"), str(toy_slices)]}
    )
    assert [len(dataset.split("val")) for dataset in prepared.datasets] == [0, 2]
    with pytest.raises(UserError, match="all_val: no slice in the train split"):
        train_adaptive.prepare(options | {"data": [str(toy_slices), str(tmp_path / "all_val")]})


def test_loss_that_is_not_finite_stops_the_run_and_keeps_what_made_it(
    fails, finished, toy_slices, tmp_path, monkeypatch
):
    """In the third step; its inputs, through the kept decoder, give the loss again."""
    import utils.training.losses

    dice_loss, calls = utils.training.losses.dice_loss, []

    def broken(logits, targets):
        calls.append(logits)
        third_step = len(calls) == len(open_dataset(toy_slices).split("val")) + 3
        return dice_loss(logits, targets) * (math.nan if third_step else 1)

    monkeypatch.setattr(utils.training.losses, "dice_loss", broken)
    options = options_for(toy_slices)
    work = ["--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu"]
    message = fails(train_adaptive.main, *work, "--epochs", EPOCHS)
    kept = read_checkpoint(tmp_path / "r" / "nonfinite_step.pth")
    (name,) = kept["slices"]
    assert f"not finite at epoch 1, slice {name}; what went in is kept in nonfinite_st" in message
    assert (kept["epoch"], kept["step"]) == (1, 2)
    factors = train_adaptive.clamped_factors(options)
    (entry,) = (e for e in open_dataset(toy_slices).split("train") if e.key == name)
    tight, targets = targets_of(entry, 256)
    boxes = train_adaptive.training_boxes(entry, tight, 1, options, factors)
    assert np.array_equal(kept["boxes"][0], boxes) and np.array_equal(kept["targets"][0], targets)
    model = load_model("lite_medsam", None, "cpu")
    load_state(model.mask_decoder, kept["mask_decoder"], tmp_path, "lite_medsam")
    with torch.no_grad():
        logits = model.decode(kept["loaded"][0].float(), boxes)
    assert torch.allclose(logits, calls[-1], atol=1e-3)


# --- Determinism ---------------------------------------------------------------------------------
def test_every_box_of_a_run_can_be_made_again(finished, toy_slices, tmp_path, monkeypatch):
    drawn = []
    perturbed = perturb.perturb

    def record(boxes, *args, **kwargs):
        drawn.append((boxes, perturbed(boxes, *args, **kwargs)))
        return drawn[-1][1]

    monkeypatch.setattr(perturb, "perturb", record)
    train(options_for(toy_slices, seed=3, delta_expand=50.0), tmp_path / "run")
    monkeypatch.setattr(perturb, "perturb", perturbed)
    per_epoch = len(open_dataset(toy_slices).split("train"))
    assert len(drawn) == EPOCHS * per_epoch
    for epoch in (1, 2):
        seen = drawn[(epoch - 1) * per_epoch : epoch * per_epoch]
        again = list(train_adaptive.boxes_of_run(tmp_path / "run", epoch))
        assert len(again) == per_epoch
        for _, labels, tight, boxes in again:
            assert labels.tolist() == [1, 2]
            assert sum(np.array_equal(tight, t) and np.array_equal(boxes, b) for t, b in seen) == 1
    monkeypatch.setattr(perturb, "DELTA_EXPAND_MAX", 10.0)
    with pytest.raises(UserError, match="constants changed"):
        list(train_adaptive.boxes_of_run(tmp_path / "run", 1))


def test_deterministic_algorithms_are_asked_for_and_change_nothing_on_a_cpu(
    finished, toy_slices, tmp_path, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        arguments = ["--data", toy_slices, "--work-dir", tmp_path, "--run", "r", "--device", "cpu"]
        arguments += ["--epochs", EPOCHS, "--deterministic"]
        train_adaptive.main([str(word) for word in arguments])
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(results(tmp_path / "r"), results(finished))
    assert files.read_json(tmp_path / "r" / "config.json")["options"]["deterministic"] is True


# --- Full weights of a run -----------------------------------------------------------------------
def test_export_of_a_run(fails, finished, tmp_path, capfd):
    path = tmp_path / "full.pth"
    words = ("--work-dir", str(finished.parent), "--run", finished.name, "--export", str(path))
    train_adaptive.main(list(words))
    assert "full weights of lite_medsam" in capfd.readouterr().out
    best = torch.load(finished / "decoder_best.pth", weights_only=True)["mask_decoder"]
    exported = torch.load(path, weights_only=True)
    for key, value in best.items():
        assert torch.equal(exported[f"mask_decoder.{key}"], value)
    assert "already exists" in fails(train_adaptive.main, *words)


def test_export_that_cannot_be(fails, finished, toy_slices, tmp_path):
    where = ("--work-dir", finished.parent, "--run", finished.name)
    path = tmp_path / "full.pth"
    for more in (["--resume"], ["--lr", "1e-3"], ["--data", toy_slices]):
        assert "alone" in fails(train_adaptive.main, *where, "--export", path, *more)
    assert "alone" in fails(train_adaptive.main, "--export", path)
    message = fails(train_adaptive.main, "--work-dir", tmp_path, "--run", "none", "--export", path)
    assert "not a run" in message
    several = tmp_path / "work" / "several"
    shutil.copytree(finished, several / "adaptive")
    shutil.copytree(finished, several / "medsam")
    for config in (several / "medsam" / "config.json", several / "config.json"):
        shutil.copy(finished / "config.json", config)
    edit_json(several / "medsam" / "config.json", lambda c: c["options"].update(policy="medsam"))
    edit_json(several / "config.json", lambda c: c["options"].update(policy="medsam,adaptive"))
    where = ("--work-dir", tmp_path / "work", "--run", "several")
    assert "medsam, adaptive" in fails(train_adaptive.main, *where, "--export", path)
    assert not path.exists()


def test_tensorboard_shows_every_epoch_once(finished, toy_slices, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    options = options_for(toy_slices)
    train(options, folder, tensorboard=True)
    train(options, folder, resume=True, tensorboard=True)  # nothing left to do
    found = events.EventAccumulator(str(folder / "tensorboard")).Reload()
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    columns = {"loss/val": "val_loss", "val_dsc/shrink": "dsc_shrink", "run/lr": "lr"}
    for tag, column in columns.items():
        steps, values = zip(*[(e.step, e.value) for e in found.Scalars(tag)], strict=True)
        assert list(steps) == [int(row["epoch"]) for row in rows]
        assert list(values) == pytest.approx([float(row[column]) for row in rows], rel=1e-5)
    assert [event.step for event in found.Scalars("loss/train")] == list(range(1, EPOCHS + 1))
    assert_same(results(folder), results(finished))  # it only watches


def test_tensorboard_that_is_not_installed(fails, toy_slices, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--data", str(toy_slices), "--work-dir", str(tmp_path / "w"), "--tensorboard"]
    assert "pip install tensorboard" in fails(train_adaptive.main, *options)
    assert not (tmp_path / "w").exists()
