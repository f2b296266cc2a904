"""The script eval.py: what it writes, and what it refuses."""

import contextlib
import csv
import io
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from utils.evaluation.output_folder import FILES

import eval as evaluation
import train_adaptive
from perturb import BOX_KINDS
from tests.helpers import edit_json
from utils.data.slices import open_dataset, read_instances, read_label_map
from utils.evaluation.scoring import Row
from utils.system import UserError
from utils.system.files import read_json, sha256


@pytest.fixture(scope="module")
def ablation(toy_slices, tmp_path_factory):
    """The folder of two policies trained for one epoch."""
    work = tmp_path_factory.mktemp("work")
    train_adaptive.main(
        [
            *("--data", str(toy_slices), "--policy", "medsam,adaptive", "--epochs", "1"),
            *("--device", "cpu", "--work-dir", str(work), "--run", "ablation"),
        ]
    )
    return work / "ablation"


@pytest.fixture(scope="module")
def results(ablation, tmp_path_factory):
    """What `eval.py --runs` leaves, and what it prints."""
    out = tmp_path_factory.mktemp("results") / "out"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(evaluation, "SWEEP", ("-20%", "20%", "-20px", "20px"))  # to be quick
        evaluation.main(
            [
                *("--runs", str(ablation), "--out", str(out), "--device", "cpu"),
                *("--split", "all", "--allow-seen", "--slices", "1", "--shift", "10%", "20px"),
                *("--draws", "2", "--seed", "7"),
            ]
        )
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
    assert {path.name for path in out.iterdir()} <= set(FILES)  # all are replaced by --overwrite
    text = (out / "report.md").read_text()
    assert "Table I. Boxes shifted by up to 10%." in printed and "Tight boxes: " in printed
    note = "or chosen by them (medsam 3 of 4, adaptive 3 of 4): what follows says nothing"
    assert text.index(note) < text.index("What can be concluded") and note in printed
    assert "trained on or chosen by" in (out / "table1.tex").read_text()  # a table may go alone
    for line in ("packaged", "policy medsam, trained for 1 epoch"):
        seen = "not recorded" if line == "packaged" else "3 of 4"
        assert re.search(f"{line}.*; evaluated patients that it has seen: {seen}\n", text)
    assert "4 patients, 8 instances" in text and "U(0, 10%)" in text and "2 draws" in text
    assert "(split all, at most 1 slice of each patient)" in text
    assert "policy of their boxes alone" in text
    assert "python eval.py --runs" in text and "--seed 7" in text
    html = (out / "report.html").read_text()
    assert html.count("<img") == 5 and 'src="data:image/png;base64,' in html
    assert 'id="panel"' in html and len(html) < 3e6
    assert "http" not in re.sub('src="data:[^"]*"', "", html)  # opens offline


def test_tables_can_be_recomputed_from_the_instances_in_ten_lines(results):
    out, _ = results
    with open(out / "instances.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == Row._fields
    shift_of = {"standard": "0%", "expansion": "10%", "shrink": "10%"}
    with open(out / "table1.csv") as file:
        table = [row for row in csv.DictReader(file) if row["shift"] == "10%"]
    for line in table[:3]:
        for model in ("untouched", "medsam", "adaptive"):
            for score in ("dsc", "nsd"):
                kept = [
                    float(row[score])
                    for row in rows
                    if (row["model"], row["box"], row["shift"])
                    == (model, line["box"], shift_of[line["box"]])
                ]
                mean = 100 * sum(kept) / len(kept)
                assert f"{mean:.4f}" == line[f"{model} {score.upper()}"]
    assert [line["box"] for line in table] == [*BOX_KINDS, "average"]
    models = ("untouched", "medsam", "adaptive")
    assert len({table[0][f"{model} DSC"] for model in models}) == 3  # each has weights of its own
    average = np.mean([float(line["adaptive DSC"]) for line in table[:3]])
    assert float(table[3]["adaptive DSC"]) == pytest.approx(average, abs=1e-3)


def test_one_model_alone_has_no_comparison_and_earlier_results_are_replaced_only_if_asked(
    toy_slices, tmp_path, capfd, fails, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "work_dir" / "eval" / "lite_medsam"  # the default
    out.mkdir(parents=True)
    for name in ("robustness.csv", "fig5.png", "comparisons.csv", "mine.txt"):
        (out / name).write_text("earlier")
    options = [
        *("--data", str(toy_slices), "--models", "lite_medsam", "--device", "cpu"),
        *("--shift", "15%", "--no-sweep", "--no-figures", "--slices", "1"),
        *("--cache-dir", str(tmp_path / "cache")),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "open_datasets", None)  # refused before any data are opened
        assert "work_dir/eval/lite_medsam: holds results already" in fails(
            evaluation.main, *options
        )

    def left() -> set[str]:
        return {p.name for p in out.iterdir() if p.is_file() and p.read_text() == "earlier"}

    with monkeypatch.context() as patch:

        def full(*_):
            raise UserError("the disk is full")

        patch.setattr("utils.evaluation.report.write_report", full)  # the last file
        assert "full" in fails(evaluation.main, *options, "--overwrite")
        assert left() == {"robustness.csv", "fig5.png", "comparisons.csv", "mine.txt"}
        assert not (out / "report.md").exists() and not (out / "table1.csv").exists()
    evaluation.main([*options, "--overwrite"])
    assert "lite_medsam DSC" in capfd.readouterr().out
    (cache,) = (tmp_path / "cache").iterdir()
    assert cache.suffix == ".bin" and "--cache-dir" in (out / "report.md").read_text()
    assert left() == {"mine.txt"} and not list(out.glob("*.png"))
    assert not (out / "comparisons.csv").exists() and not (out / "robustness.csv").exists()


# --- Runs ----------------------------------------------------------------------------------------
def test_runs_that_cannot_be_compared(ablation, toy_slices, tmp_path, fails):
    def message(*arguments) -> str:
        return fails(evaluation.main, *arguments, "--out", tmp_path / "out", "--device", "cpu")

    assert "not a run of train_adaptive.py" in message("--runs", tmp_path)
    shutil.copytree(ablation, tmp_path / "copy")
    changed = tmp_path / "copy" / "adaptive" / "config.json"
    start_weights = read_json(changed)["start_weights"]
    edit_json(changed, lambda config: config.update(start_weights="other"))
    assert "started from other weights" in message("--runs", tmp_path / "copy")
    assert "not the weights that the runs started from" in message(
        "--runs", tmp_path / "copy" / "adaptive"
    )
    edit_json(changed, lambda config: config.update(start_weights=start_weights))
    seen = message("--runs", tmp_path / "copy", "--split", "val")
    assert "(medsam 1 of 1, adaptive 1 of 1; " in seen and "--allow-seen" in seen
    moved = str(tmp_path / "moved")
    edit_json(changed, lambda config: config["options"].update(data=[moved]))
    adaptive = tmp_path / "copy" / "adaptive"
    assert f"{moved}: the data that the runs" in message("--runs", adaptive)
    (adaptive / "decoder_best.pth").unlink()
    assert "not trained yet" in message("--runs", tmp_path / "copy")
    twice = message("--runs", ablation, "--models", "medsam=lite_medsam")
    assert "two models are named 'medsam'" in twice
    assert not (tmp_path / "out").exists()


def test_differences_between_runs(ablation, tmp_path):
    from utils.training.runs import differences, find_runs

    assert differences(find_runs([ablation])) == []
    shutil.copytree(ablation, tmp_path / "second")
    for policy in ("medsam", "adaptive"):
        path = tmp_path / "second" / policy / "config.json"
        edit_json(path, lambda config: config["options"].update(seed=1, cache_dir="elsewhere"))
    runs = find_runs([ablation, tmp_path / "second"])
    assert [run.name for run in runs] == [
        *("ablation-medsam", "ablation-adaptive", "second-medsam", "second-adaptive")
    ]
    one_each = [tmp_path / "second" / "adaptive", ablation / "adaptive"]
    assert [run.name for run in find_runs(one_each)] == ["second-adaptive", "ablation-adaptive"]
    (difference,) = differences(runs)
    assert difference.startswith("seed (ablation-medsam: 0") and runs[0].epochs == 1
    path = tmp_path / "second" / "adaptive" / "config.json"
    edit_json(path, lambda config: config["box_code"]["constants"].update(MEDSAM_SHIFT=30))
    with open(tmp_path / "second" / "adaptive" / "log.csv", "a") as file:
        file.write("2\n")
    lines = differences(find_runs([tmp_path / "second"]))
    assert [line.split(" (")[0] for line in lines] == ["MEDSAM_SHIFT", "epochs trained"]
    # Two runs of one policy whose theta_omega differs; the runs of medsam do not use it.
    edit_json(
        path,
        lambda config: config["box_code"]["fingerprints"].update({"theta_omega by width": "0123"}),
    )
    lines = [
        line for line in differences(find_runs([ablation, tmp_path / "second"])) if "theta" in line
    ]
    assert len(lines) == 1 and lines[0].startswith(
        "values of theta_omega by width (ablation-adaptive: "
    )
    assert lines[0].endswith(", second-adaptive: 0123)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lite_medsam", ("lite_medsam", "lite_medsam", None)),
        ("ours=lite_medsam:a/b.pth", ("ours", "lite_medsam", "a/b.pth")),
        ("medsam_vit_b:x=1.pth", ("medsam_vit_b", "medsam_vit_b", "x=1.pth")),
        (r"w=medsam_vit_b:C:\w\m.pth", ("w", "medsam_vit_b", r"C:\w\m.pth")),
    ],
)
def test_model_argument(text, expected):
    assert evaluation.parse_model(text) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "give --runs DIR or --models"),
        ("=lite_medsam", "expected NAME=MODEL"),
        ("../x=lite_medsam", "NAME of letters"),
        ("unet", "unknown model 'unet'"),
        ("lite_medsam lite_medsam", "two models are named 'lite_medsam'"),
        ("lite_medsam:nowhere.pth", "no such checkpoint"),
        ("lite_medsam --shift 0.15", "expected a share of the side like 15%"),
        ("lite_medsam --shift 50%", "less than half the side"),
        ("lite_medsam --shift -5%", "must be more than 0"),
        ("lite_medsam --shift 5% 5%", "given twice"),
        ("lite_medsam --draws 0", "--draws: expected a whole number, 1 or more"),
        ("lite_medsam --slices 0", "--slices: expected a whole number, 1 or more"),
        ("lite_medsam --workers -1", "--workers: expected a whole number, 0"),
        ("lite_medsam --baseline b", "no model 'b' to compare"),
        ("lite_medsam --tolerance -1", "--tolerance: expected mm"),
        ("lite_medsam --tolerance flare22", "none for 'large'"),
        ("lite_medsam --cache off --cache-dir x", "leave out one of the two"),
        ("lite_medsam --amp fp16", "--amp fp16 needs a GPU"),
        ("lite_medsam --split both", "invalid choice: 'both'"),
    ],
)
def test_bad_options(fails, toy_slices, tmp_path, arguments, expected):
    words = ["--models", *arguments.split()] if arguments else []
    options = ("--data", toy_slices, "--out", tmp_path / "out", "--device", "cpu", *words)
    assert expected in fails(evaluation.main, *options)
    assert not (tmp_path / "out").exists()


def test_labels_that_the_data_set_does_not_list_are_an_error(toy_slices, tmp_path):
    shutil.copytree(toy_slices, tmp_path / "copy")
    entry = open_dataset(tmp_path / "copy").split("all")[0]
    label_map = read_label_map(entry.label_path)
    for changed, expected in ((label_map * 3, "[3, 6]"), (label_map * 0, "[]")):
        np.save(entry.label_path, changed)
        with pytest.raises(UserError, match="changed or damaged"):
            read_instances(entry)
        entry = replace(entry, label_sha256=sha256(entry.label_path))
        with pytest.raises(UserError, match="preprocess again") as error:
            read_instances(entry)
        assert f"holds labels {expected}" in str(error.value)
