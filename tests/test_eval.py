"""The script eval.py: what it writes, and what it refuses."""

import contextlib
import io
import re
import shutil
from functools import partial

import pandas as pd
import pytest

import eval as evaluation
import train_adaptive
from tests.helpers import all_in_split, call, copy_slices, edit_json
from utils.evaluation.report import RESULT_FILES
from utils.system import UserError
from utils.system.files import read_json
from utils.training.runs import differences, find_runs

pytestmark = pytest.mark.usefixtures("small_lite_medsam")


@pytest.fixture(scope="module")
def ablation(toy_slices, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    words = ["--data", toy_slices, "--policy", "medsam,adaptive", "--epochs", "1"]
    call(train_adaptive, *words, "--device", "cpu", "--work-dir", work, "--run", "ablation")
    return work / "ablation"


@pytest.fixture(scope="module")
def results(ablation, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "out"
    words = ["--runs", str(ablation), "--out", str(out), "--device", "cpu", "--split", "all"]
    words += ["--allow-seen", "--slices", "1", "--shift", "10%", "20px", "--draws", "2"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(evaluation, "SWEEP", ("-20%", "20%", "-20px", "20px"))  # to be quick
        call(evaluation, *words, "--seed", "7")
    return out, text.getvalue()


def test_script_writes_all_of_the_report(results):
    out, printed = results
    tables = {f"table{n}.{suffix}" for n in (1, 2, 3) for suffix in ("md", "csv", "tex")}
    assert {path.name for path in out.iterdir()} == {
        *tables,
        *("report.md", "report.html", "instances.csv", "labels.csv", "comparisons.csv"),
        *("families.csv", "families.png"),
        *("robustness.csv", "robustness_side.png", "robustness_px.png", "fig4.png", "fig6.png"),
    }  # no fig5: no instance is small
    assert {path.name for path in out.iterdir()} <= set(RESULT_FILES)  # --overwrite replaces them
    text = (out / "report.md").read_text()
    assert "4 patients cannot support a conclusion: 7 are needed" in printed
    note = "patients of this evaluation (medsam 3 of 4, adaptive 3 of 4): what follows says nothing"
    assert text.index(note) < text.index("##") and note in printed
    assert "trained or selected on" in (out / "table1.tex").read_text()  # a table may go alone
    for line in ("packaged", "policy medsam, trained for 1 epoch"):
        seen = "not recorded" if line == "packaged" else "3 of 4"
        assert re.search(f"{line}.*; evaluated patients that it has seen: {seen}\n", text)
    assert "4 patients, 8 instances" in text and "2 draws" in text and "--seed 7" in text
    means = pd.read_csv(out / "instances.csv").groupby("model")["dsc"].mean()
    assert means.nunique() > 1  # they are not one model
    html = (out / "report.html").read_text()
    assert html.count("<img") == 5 and 'src="data:image/webp;base64,' in html
    assert 'id="panel"' in html and len(html) < 3e6
    assert "http" not in re.sub('src="data:[^"]*"', "", html)  # opens offline


def test_earlier_results_are_replaced_as_a_whole_and_only_if_asked(
    toy_slices, tmp_path, fails, monkeypatch
):
    """One model alone, without comparisons."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "work_dir" / "eval" / "lite_medsam"  # the default
    options = ("--data", toy_slices, "--models", "lite_medsam", "--device", "cpu")
    options += ("--shift", "15%", "--no-sweep", "--no-figures", "--slices", "1")
    options += ("--cache-dir", tmp_path / "cache")
    message = partial(fails, evaluation, *options)

    def left() -> dict[str, str]:
        return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}

    saved = out / "predictions" / "m" / "toy" / "p.nii.gz"
    saved.parent.mkdir(parents=True)
    for path in (saved, *(out / name for name in ("robustness.csv", "fig5.png", "mine.txt"))):
        path.write_text("earlier")
    before = left()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "open_datasets", None)  # refused before any data are opened
        assert "work_dir/eval/lite_medsam: already holds results" in message()
        assert "holds mine.txt; choose another" in message("--overwrite")
    (out / "mine.txt").unlink()
    del before["mine.txt"]

    def full(*_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("utils.evaluation.report.write_report", full)  # the last file
        assert "full" in message("--overwrite")
    assert left() == before and saved.is_file()
    call(evaluation, *options, "--overwrite")
    assert "--cache-dir" in (out / "report.md").read_text() and any((tmp_path / "cache").iterdir())
    assert "comparisons.csv" not in left() and not left().keys() & before.keys()
    assert not saved.parent.exists()
    assert [path.name for path in out.parent.iterdir()] == ["lite_medsam"]


def test_runs_that_cannot_be_compared(ablation, tmp_path, fails):
    message = partial(fails, evaluation, "--out", tmp_path / "out", "--device", "cpu")
    assert "not a run, here or in work_dir/" in message("--runs", tmp_path)
    shutil.copytree(ablation, tmp_path / "copy")
    adaptive = tmp_path / "copy" / "adaptive"
    config = adaptive / "config.json"
    start_weights = read_json(config)["start_weights"]
    edit_json(config, lambda config: config.update(start_weights="other"))
    assert "did not start from the weights" in message("--runs", tmp_path / "copy")
    assert "no longer the weights that the runs started from" in message("--runs", adaptive)
    edit_json(config, lambda config: config.update(start_weights=start_weights))
    seen = message("--runs", tmp_path / "copy", "--split", "val")
    assert "(medsam 1 of 1, adaptive 1 of 1; " in seen and "--allow-seen" in seen
    moved = str(tmp_path / "moved")
    edit_json(config, lambda config: config["options"].update(data=[moved]))
    assert f"{moved}: no such folder" in message("--runs", adaptive)
    (adaptive / "decoder_best.pth").unlink()
    assert "not trained yet" in message("--runs", tmp_path / "copy")
    twice = message("--runs", ablation, "--models", "medsam=lite_medsam")
    assert "two models are named 'medsam'" in twice
    assert not (tmp_path / "out").exists()


def test_differences_between_runs(ablation, tmp_path):
    assert differences(find_runs([ablation])) == []
    shutil.copytree(ablation, tmp_path / "second")
    config = tmp_path / "second" / "adaptive" / "config.json"
    edit_json(config, lambda config: config["options"].update(seed=1, cache_dir="elsewhere"))
    edit_json(config, lambda config: config.update(perturb_sha256="0" * 64))
    perturb, seed = differences(find_runs([ablation / "adaptive", config.parent]))
    assert perturb.startswith("perturb.py ")
    assert seed == "seed (ablation-adaptive: 0, second-adaptive: 1)"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("unet", "unknown model 'unet'"),
        ("lite_medsam lite_medsam", "two models are named 'lite_medsam'"),
        ("lite_medsam:nowhere.pth", "no such checkpoint"),
        ("lite_medsam --baseline b", "no model 'b' to compare"),
        ("lite_medsam --tolerance flare22", "none for 'large'"),
        ("lite_medsam --split train", "the train split is empty; choose another --split"),
    ],
)
def test_models_and_options_that_do_not_fit(fails, toy_slices, tmp_path, words, expected):
    if "train" in words:
        toy_slices = copy_slices(toy_slices, tmp_path / "toy", partial(all_in_split, "test"))
    options = ("--data", toy_slices, "--out", tmp_path / "out", "--device", "cpu", "--models")
    assert expected in fails(evaluation, *options, *words.split())
    assert not (tmp_path / "out").exists()
