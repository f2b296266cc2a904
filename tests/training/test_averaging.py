"""--average: the greedy recipe on made-up scores, and means of runs trained on the toy data."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import eval as evaluation
import train_adaptive
from tests.helpers import assert_same_weights, call, edit_json, options_for
from train_adaptive import train
from utils.model.segmenter import load_model
from utils.system import UserError, files
from utils.training import averaging, runs
from utils.training.averaging import greedy_mean, mean_weights, score_table


def numbers(*values: float) -> list[dict[str, torch.Tensor]]:
    return [{"weight": torch.tensor(value)} for value in values]


START = {"weight": torch.tensor(20.0)}


def near(target: float):
    """Scores a weight by its distance from `target`, in two families."""

    def score(weights: dict[str, torch.Tensor]) -> list[float]:
        miss = abs(weights["weight"].item() - target)
        return [1 - miss, 0.5 - miss]

    return score


@pytest.mark.parametrize(
    ("target", "kept", "weight"),
    [
        (6.0, [3], 5.0),  # with 4 the mean is farther off, with 9 it is 7, as far as 5
        (6.6, [3, 2], 7.0),  # 5, with 9 nearer, with 4 (6) and with 10 (8) farther
    ],
)
def test_decoders_are_tried_best_first_and_stay_if_they_help(target, kept, weight):
    mean = greedy_mean(numbers(10.0, 4.0, 9.0, 5.0), near(target), START, 0.0)
    assert mean.kept == kept and mean.weights["weight"].item() == weight
    assert mean.dsc == near(target)(mean.weights)
    alone = [1 - abs(value - target) for value in (10, 4, 9, 5)]
    assert [dsc[0] for dsc in mean.alone] == pytest.approx(alone)


def test_the_mean_is_never_worse_than_its_best_decoder():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mean = greedy_mean(numbers(*rng.normal(size=6).tolist()), near(rng.normal()), START, 0.0)
        assert np.mean(mean.dsc) >= max(map(np.mean, mean.alone))


def test_a_share_of_the_starting_weights_is_in_every_mean_that_is_tried():
    """With half of 20, that of 10 alone is 15, and that of 10 and 4 is 13.5, nearer to 11."""
    mean = greedy_mean(numbers(10.0, 4.0), near(11.0), {"weight": torch.tensor(20.0)}, 0.5)
    assert mean.kept == [0, 1] and mean.weights["weight"].item() == 13.5
    assert mean.dsc[0] == pytest.approx(1 - 2.5) and mean.alone[0][0] == pytest.approx(0)


def test_mean_weights_and_the_table_of_scores():
    assert mean_weights(numbers(1.0, 3.0, 8.0), START, 0.0) == numbers(4.0)[0]
    assert mean_weights(numbers(1.0, 7.0), START, 0.25) == numbers(8.0)[0]
    mean = averaging.Mean({}, [0.9] * 7, [[0.5] * 7, [0.8] * 7, [0.7] * 7], [1, 0])
    table = score_table(["x", "y", "z"], mean, [0.4] * 7, 0.25)
    assert table["decoder"].tolist() == ["y", "z", "x", "starting weights", "kept and starting"]
    assert table["kept"].tolist() == ["yes", "no", "yes", "25 %", ""]
    assert table["mean"].tolist() == pytest.approx([0.8, 0.7, 0.5, 0.4, 0.9])
    assert table.columns[-2:].tolist() == ["measured", "mean"]


@pytest.fixture(scope="module")
def work(toy_slices, tmp_path_factory) -> Path:
    """A run, two that differ from it in opposite directions, and their mean: its weights again."""
    work = tmp_path_factory.mktemp("work")
    train(options_for(toy_slices, epochs=1), work / "trained")
    for name, sign, lr in (("a", 1, 1e-4), ("b", -1, 3e-4)):
        copy_run(work / "trained", work / name, lr=lr)
        change_decoder(work / name, partial(scaled, sign, torch.Generator().manual_seed(0)))
    average(work, "mean", "a", "b")
    return work


def copy_run(run: Path, copy: Path, **options: object) -> Path:
    """A copy that says to have been trained with other options."""
    shutil.copytree(run, copy)
    edit_json(copy / "config.json", lambda config: config["options"].update(options))
    return copy


def scaled(sign: int, generator: torch.Generator, value: torch.Tensor) -> torch.Tensor:
    """Every weight by a fifth larger or smaller at random; the other way round with sign -1."""
    return value * (1 + sign * 0.2 * (2 * torch.rand(value.shape, generator=generator) - 1).sign())


def decoder_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "decoder_best.pth", weights_only=True)["mask_decoder"]


def change_decoder(run: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    content = torch.load(run / "decoder_best.pth", weights_only=True)
    changed = {name: change(value) for name, value in content["mask_decoder"].items()}
    torch.save(content | {"mask_decoder": changed}, run / "decoder_best.pth")


def average(work: Path, name: str, *of: str) -> None:
    where = ("--work-dir", work, "--run", name, "--device", "cpu", "--start-share", 0)
    call(train_adaptive, "--average", *(work / run for run in of), *where)


def test_folder_of_a_mean(work):
    folder = work / "mean"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "decoder_best.pth", "average.csv"}
    config = files.read_json(folder / "config.json")
    paths = [str(work / name) for name in "ab"]
    assert [(each["run"], each["kept"]) for each in config["average"]] == [(p, True) for p in paths]
    assert [each["options"]["lr"] for each in config["average"]] == [1e-4, 3e-4]
    assert config["options"]["model"] == "lite_medsam" and "policy" not in config["options"]
    assert_same_weights(
        decoder_of(folder),
        mean_weights([decoder_of(work / n) for n in "ab"], decoder_of(work / "a"), 0.0),
    )
    seen = [runs.seen_patients(run / "decoder_best.pth") for run in (folder, work / "a")]
    assert seen[0] == seen[1]


def test_scores_are_those_of_the_validation_patients(work):
    """Under tight boxes the mean's is what the trained run, whose weights it has, logged."""
    average(work, "again", "b", "a")
    rows, again = (pd.read_csv(work / name / "average.csv") for name in ("mean", "again"))
    pd.testing.assert_frame_equal(rows, again)
    assert rows["kept"].tolist()[:3] == ["yes", "yes", "0 %"]
    assert rows["mean"][3] > rows["mean"][:2].max()
    log = pd.read_csv(work / "trained" / "log.csv")
    best = log["dsc_standard"][log["val_loss"].idxmin()]
    assert rows["standard"][3] == pytest.approx(best, abs=1e-3)
    assert rows["standard"][2] == pytest.approx(log["dsc_standard"][0], abs=1e-3)


def test_a_decoder_that_was_tried_and_left_out_is_not_in_the_mean(work, tmp_path):
    """It is the last one that was scored, so its mean is what the network held."""
    shutil.copytree(work / "a", tmp_path / "bad")
    change_decoder(tmp_path / "bad", lambda value: value + 0.1)
    average(work, "three", "a", "b", str(tmp_path / "bad"))
    kept = [each["kept"] for each in files.read_json(work / "three" / "config.json")["average"]]
    assert kept == [True, True, False]
    assert_same_weights(decoder_of(work / "three"), decoder_of(work / "mean"))


def test_recommended_trains_its_policies_and_averages_them_in_one_folder(
    toy_slices, tmp_path, capfd, fails, monkeypatch
):
    monkeypatch.setattr("utils.system.loops.LINE_SECONDS", 0)
    where = ("--work-dir", tmp_path, "--run", "one")
    data = ("--data", toy_slices, "--device", "cpu")
    assert "requires --average" in fails(train_adaptive, *where, *data, "--start-share", 0.1)
    call(train_adaptive, *where, *data, "--epochs", 1, "--policy", "recommended")
    folder = tmp_path / "one"
    shown = capfd.readouterr()
    assert f"next: python eval.py --runs {folder}" in shown.out
    assert "validating: " in shown.err and "averaging: 7 of 7 means" in shown.err
    names = [run.name for run in runs.find_runs([folder])]
    assert names == ["none", "mixed", "measured", "recommended"]
    mean = files.read_json(folder / "recommended/config.json")
    assert mean["start_share"] == 0.2 and len(mean["average"]) == 3
    kept = [decoder_of(Path(each["run"])) for each in mean["average"] if each["kept"]]
    start = load_model("lite_medsam", None, "cpu").mask_decoder.state_dict()
    assert_same_weights(decoder_of(folder / "recommended"), mean_weights(kept, start, 0.2))
    again = ("--resume", "--epochs", 2, "--start-share", 0.5)
    call(train_adaptive, *where, *again)
    assert files.read_json(folder / "recommended/config.json")["start_share"] == 0.5
    assert runs.find_runs([folder])[0].epochs == 2
    shutil.copytree(folder, tmp_path / "two")
    two = runs.find_runs([folder / "recommended", tmp_path / "two/recommended"])
    assert [run.name for run in two] == ["one-recommended", "two-recommended"]
    assert {*runs.trainings(two).values()} == {"recommended"}


def test_evaluation_of_a_mean(work, tmp_path):
    out = ("--out", tmp_path / "out", "--device", "cpu", "--split", "val", "--allow-seen")
    options = ("--shift", "15%", "20px", "--no-sweep", "--no-figures", "--slices", "1")
    call(evaluation, "--runs", work / "mean", work / "a", *out, *options)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "`mean`: lite_medsam, decoder_best.pth, SHA-256" in report
    assert f"mean of 2 decoders chosen on validation: {work / 'a'}, {work / 'b'}" in report
    assert report.count("evaluated patients that it has seen: 1 of 1") == 2


def test_a_mean_is_exported_but_not_resumed(work, fails, tmp_path):
    where = ("--work-dir", work, "--run", "mean")
    assert "not from a run that can be resumed" in fails(train_adaptive, *where, "--resume")
    path = tmp_path / "full.pth"
    call(train_adaptive, *where, "--export", path)
    exported = torch.load(path, weights_only=True)
    assert_same_weights(exported, decoder_of(work / "mean"), "mask_decoder.")


def test_averages_that_cannot_be(work, fails, tmp_path, monkeypatch):
    def message(*words: object, run: str = "new") -> str:
        result = fails(train_adaptive, "--work-dir", tmp_path, "--run", run, *words)
        assert not (tmp_path / "new").exists()
        return result

    a, b = work / "a", work / "b"
    assert "needs two decoders or more" in message("--average", a)
    assert "not a run" in message("--average", a, tmp_path)
    assert "--average: cannot be used with --lr" in message("--average", a, b, "--lr", "1e-3")
    assert "not allowed with argument" in message("--average", a, b, "--resume")
    shutil.copytree(b, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    assert "already exists" in message("--average", a, b, run="other")
    edit_json(config, lambda config: config["data"]["toy"].update(sha256="0" * 64))
    assert "was not trained on the same data" in message("--average", a, tmp_path / "other")
    edit_json(config, lambda config: config.update(start_weights="0" * 64))
    assert "did not start from the weights" in message("--average", a, tmp_path / "other")
    shutil.copytree(work / "mean", tmp_path / "stopped")
    (tmp_path / "stopped" / "decoder_best.pth").unlink()
    assert "not trained yet" in message("--average", a, tmp_path / "stopped")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run in one process"):
        call(train_adaptive, "--work-dir", tmp_path, "--run", "new", "--average", a, b)


def test_seeds_of_one_training(work, tmp_path):
    again = copy_run(work / "a", tmp_path / "a-1", seed=1)
    folders = [work / "a", work / "b", work / "mean", again]
    assert runs.trainings(runs.find_runs(folders)) == {
        "a-adaptive": "adaptive, lr 0.0001",
        "b-adaptive": "adaptive, lr 0.0003",
        "mean": "mean",
        "a-1-adaptive": "adaptive, lr 0.0001",
    }
