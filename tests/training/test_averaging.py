"""--average: the greedy recipe on made-up scores, and means of runs trained on the toy data."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train_adaptive
from tests.helpers import call, edit_json, options_for
from train_adaptive import train
from utils.system import files
from utils.training import averaging, runs
from utils.training.averaging import greedy_mean, mean_weights, score_table


# --- The recipe ----------------------------------------------------------------------------------
def numbers(*values: float) -> list[dict[str, torch.Tensor]]:
    return [{"weight": torch.tensor(value)} for value in values]


def near(target: float):
    """Scores a weight by its distance from `target`, in two families."""

    def score(weights: dict[str, torch.Tensor]) -> list[float]:
        miss = abs(weights["weight"].item() - target)
        return [1 - miss, 0.5 - miss]

    return score


def test_decoders_are_tried_best_first_and_stay_if_they_help():
    mean = greedy_mean(numbers(10.0, 4.0, 9.0, 5.0), near(6.0))
    # 5 is best; with 4 the mean is farther off, with 9 it is 7, as far as 5; with 10 it is 7.5.
    assert mean.kept == [3]
    mean = greedy_mean(numbers(10.0, 4.0, 9.0, 5.0), near(6.6))
    # 5, with 9 nearer (7), with 4 nearer still in no case (6), with 10 not either (8).
    assert mean.kept == [3, 2] and mean.weights["weight"].item() == 7.0
    assert mean.dsc == pytest.approx([0.6, 0.1])
    assert [dsc[0] for dsc in mean.alone] == pytest.approx([-2.4, -1.6, -1.4, -0.6])


def test_the_mean_is_never_worse_than_its_best_decoder():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mean = greedy_mean(numbers(*rng.normal(size=6).tolist()), near(rng.normal()))
        assert np.mean(mean.dsc) >= max(map(np.mean, mean.alone))


def test_mean_weights_and_the_table_of_scores():
    decoders = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    assert mean_weights(decoders)["a"].tolist() == [2.0, 4.0]
    mean = averaging.Mean({}, [0.9] * 6, [[0.5] * 6, [0.8] * 6, [0.7] * 6], [1, 0])
    table = score_table(["x", "y", "z"], mean)
    assert table["decoder"].tolist() == ["y", "z", "x", "mean of the kept"]
    assert table["kept"].tolist() == ["yes", "no", "yes", ""]
    assert table["mean"].tolist() == pytest.approx([0.8, 0.7, 0.5, 0.9])
    families = ["standard", "expansion 15%", "shrink 15%", "expansion 20px", "shrink 20px"]
    assert list(table.columns[2:-1]) == [*families, "loose 15%"]


# --- Means of runs -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def work(toy_slices, tmp_path_factory) -> Path:
    """Two runs of one epoch, b with a larger learning rate, and their mean, which is better."""
    work = tmp_path_factory.mktemp("work")
    for name, lr in (("a", 1e-4), ("b", 3e-4)):
        train(options_for(toy_slices, epochs=1, lr=lr), work / name)
    average(work, "mean", "a", "b")
    return work


def average(work: Path, name: str, *of: str) -> None:
    where = ("--work-dir", work, "--run", name, "--device", "cpu")
    call(train_adaptive, "--average", *(work / run for run in of), *where)


def test_folder_of_a_mean(work):
    folder = work / "mean"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "decoder_best.pth", "average.csv"}
    config = files.read_json(folder / "config.json")
    assert [each["run"] for each in config["average"]] == [str(work / name) for name in "ab"]
    assert [each["options"]["lr"] for each in config["average"]] == [1e-4, 3e-4]
    assert config["options"]["model"] == "lite_medsam" and "policy" not in config["options"]
    kept = {each["run"] for each in config["average"] if each["kept"]}
    paths = [Path(run) / "decoder_best.pth" for run in sorted(kept)]
    decoders = [torch.load(path, weights_only=True)["mask_decoder"] for path in paths]
    content = torch.load(folder / "decoder_best.pth", weights_only=True)
    for name, value in mean_weights(decoders).items():
        assert torch.equal(content["mask_decoder"][name], value)
    assert content["seen"] == runs.seen_patients(work / "a" / "decoder_best.pth")
    with open(folder / "average.csv") as file:
        *alone, mean = csv.DictReader(file)
    assert float(mean["mean"]) > max(float(row["mean"]) for row in alone)
    assert {row["decoder"] for row in alone if row["kept"] == "yes"} == kept and len(kept) == 2


def test_a_decoder_that_was_tried_and_left_out_is_not_in_the_mean(work, tmp_path):
    """It is the last one that was scored, so its mean is what the network held."""
    shutil.copytree(work / "a", tmp_path / "bad")
    path = tmp_path / "bad" / "decoder_best.pth"
    content = torch.load(path, weights_only=True)
    decoder = content["mask_decoder"]
    content["mask_decoder"] = {name: value + 0.1 for name, value in decoder.items()}
    torch.save(content, path)
    average(work, "three", "a", "b", str(tmp_path / "bad"))
    kept = [each["kept"] for each in files.read_json(work / "three" / "config.json")["average"]]
    assert kept == [True, True, False]
    made, expected = (
        torch.load(work / name / "decoder_best.pth", weights_only=True)["mask_decoder"]
        for name in ("three", "mean")
    )
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def scores_of(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of an average.csv by decoder."""
    with open(folder / "average.csv") as file:
        return {row["decoder"]: row for row in csv.DictReader(file)}


def test_scores_are_those_of_the_validation_patients(work):
    """Under tight boxes they are what the runs logged, whose decoders are of their last epoch."""
    average(work, "again", "b", "a")
    assert scores_of(work / "mean") == scores_of(work / "again")
    for name in "ab":
        with open(work / name / "log.csv") as file:
            logged = list(csv.DictReader(file))[-1]["dsc_standard"]
        dsc = scores_of(work / "mean")[str(work / name)]["standard"]
        assert float(dsc) == pytest.approx(float(logged), abs=1e-4)


def test_evaluation_of_a_mean(work, tmp_path):
    out = ("--out", tmp_path / "out", "--device", "cpu", "--split", "val", "--allow-seen")
    options = ("--shift", "15%", "20px", "--no-sweep", "--no-figures", "--slices", "1")
    call(evaluation, "--runs", work / "mean", work / "a", *out, *options)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "`mean`: lite_medsam, decoder_best.pth, SHA-256" in report
    assert f"mean of 2 decoders chosen on validation: {work / 'a'}, {work / 'b'}" in report
    assert report.count("evaluated patients that it has seen: 1 of 1") == 2


def test_what_a_mean_is_not(work, fails, tmp_path):
    where = ("--work-dir", work, "--run", "mean")
    assert "not of a run that can be resumed" in fails(train_adaptive, *where, "--resume")
    path = tmp_path / "full.pth"
    call(train_adaptive, *where, "--export", path)
    best = torch.load(work / "mean" / "decoder_best.pth", weights_only=True)["mask_decoder"]
    exported = torch.load(path, weights_only=True)
    assert all(torch.equal(exported[f"mask_decoder.{k}"], value) for k, value in best.items())


def test_averages_that_cannot_be(work, fails, toy_slices, tmp_path, monkeypatch):
    def message(*words: object, run: str = "new") -> str:
        result = fails(train_adaptive, "--work-dir", tmp_path, "--run", run, *words)
        assert not (tmp_path / "new").exists()
        return result

    a, b = work / "a", work / "b"
    assert "needs two decoders or more" in message("--average", a)
    assert "not a run" in message("--average", a, tmp_path)
    for more in (["--lr", "1e-3"], ["--data", toy_slices]):
        assert f"--average: goes without {more[0]}" in message("--average", a, b, *more)
    for more in ("--resume", "--demo"):
        assert "not allowed with argument" in message("--average", a, b, more)
    assert "--run: say which run" in fails(train_adaptive, "--average", a, b)
    shutil.copytree(b, tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    assert "already exists" in message("--average", a, b, run="other")
    edit_json(config, lambda config: config.update(start_weights="0" * 64))
    assert "started from other weights" in message("--average", a, tmp_path / "other")
    edit_json(
        config,
        lambda c: c.update(start_weights=files.read_json(a / "config.json")["start_weights"]),
    )
    edit_json(config, lambda config: config["data"]["toy"].update(sha256="0" * 64))
    assert "was trained on other data" in message("--average", a, tmp_path / "other")
    shutil.copytree(work / "mean", tmp_path / "stopped")
    (tmp_path / "stopped" / "decoder_best.pth").unlink()
    assert "not trained yet" in message("--average", a, tmp_path / "stopped")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "run in one process" in message("--average", a, b)


def test_seeds_of_one_training(work, tmp_path):
    """Runs that differ in the seed alone are one training."""
    shutil.copytree(work / "a", tmp_path / "a-1")
    edit_json(tmp_path / "a-1" / "config.json", lambda config: config["options"].update(seed=1))
    folders = [work / "a", work / "b", work / "mean", tmp_path / "a-1"]
    assert runs.trainings(runs.find_runs(folders)) == {
        "a-adaptive": "adaptive, lr 0.0001",
        "b-adaptive": "adaptive, lr 0.0003",
        "mean": "mean",
        "a-1-adaptive": "adaptive, lr 0.0001",
    }
