"""Evaluation: the boxes, the scores of models with known answers, and the script."""

import contextlib
import csv
import io
import re
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import eval as evaluation
import train_adaptive
from perturb import BOX_KINDS, Shift
from tests.helpers import edit_json
from utils.data.flare22 import FLARE22_LABELS, FLARE22_TOLERANCES_MM
from utils.data.slices import open_dataset, read_label_map
from utils.evaluation.comparisons import Protocol
from utils.evaluation.paper_tables import table_two
from utils.evaluation.scores import COLUMNS, Scores
from utils.evaluation.scoring import Scorer, Target
from utils.system.errors import UserError
from utils.system.files import read_json, sha256

PROTOCOL = Protocol(
    what="toy",
    shifts=(Shift(0.15, "side"), Shift(20, "px")),
    sweep=(Shift(-0.25, "side"), Shift(0.25, "side"), Shift(-20, "px"), Shift(20, "px")),
    draws=2,
    seed=0,
    tolerance="2 mm",
    small_share=evaluation.SMALL_SHARE,
    error_leak=evaluation.ERROR_LEAK,
    error_dsc=evaluation.ERROR_DSC,
    baseline="a",
    proposed="b",
)


class KnownAnswer:
    """A model whose embedding is the label map and whose masks are what `answer` makes of it."""

    device = torch.device("cpu")

    def __init__(self, answer) -> None:
        self.answer, self.boxes = answer, []

    def decode(self, embedding, boxes):
        self.boxes.append(boxes)
        labels = [label for label in embedding.unique() if label]
        masks = torch.stack([self.answer(embedding == label) for label in labels])
        return (masks.float() - 0.5).repeat(len(boxes) // len(labels), 1, 1)


def label_map_of(entry) -> torch.Tensor:
    return torch.from_numpy(read_label_map(entry.label_path))


@pytest.fixture
def slices(toy_slices):
    return open_dataset(toy_slices).split("all")


def evaluate(slices, tolerance=2.0, workers=0, **models):
    known = {name: KnownAnswer(answer) for name, answer in models.items()}
    tolerances = evaluation.tolerances_of(tolerance, slices)
    embeddings = dict.fromkeys(known, label_map_of)
    several = len({entry.dataset for entry in slices}) > 1
    rows = evaluation.evaluate(
        known, embeddings, slices, tolerances, PROTOCOL, None, workers, several
    )
    return Scores.of(rows), known


def mean(scores: Scores, score: str, **where) -> float:
    return float(np.mean(scores.where(**where)[score]))


# --- Scores --------------------------------------------------------------------------------------
def test_models_with_known_answers(slices):
    scores, _ = evaluate(
        slices,
        target=lambda target: target,
        nothing=torch.zeros_like,
        half=lambda target: target & (torch.arange(1024) < target.any(0).nonzero().median()),
        everything=torch.ones_like,
    )
    prompts = 1 + 2 * 2 * 2 + 4  # standard; kinds, shifts, draws; the sweep
    assert len(scores) == 4 * len(slices) * 2 * prompts  # models, slices, labels
    assert set(scores.distinct("box")) == {*BOX_KINDS, "sweep"}
    for box in (*BOX_KINDS, "sweep"):
        for score, target in (("dsc", 1), ("nsd", 1), ("leak", 0), ("error", 0)):
            assert (scores.where(model="target", box=box)[score] == target).all()
        for score, nothing in (("dsc", 0), ("nsd", 0), ("leak", 0), ("error", 1)):
            assert (scores.where(model="nothing", box=box)[score] == nothing).all()
        assert mean(scores, "dsc", model="half", box=box) == pytest.approx(2 / 3, abs=0.08)
        assert (scores.where(model="everything", box=box)["error"] == 1).all()


def test_scores_of_other_processes_are_the_same_in_the_same_order(slices):
    answers = {"half": lambda target: target & (torch.rand(1024) < 0.5), "all": torch.ones_like}
    found = []
    for workers in (0, 2):
        torch.manual_seed(0)
        found.append(evaluate(slices, workers=workers, **answers)[0])
    for column in COLUMNS:
        assert (found[0][column] == found[1][column]).all()


def test_a_scoring_process_that_dies_is_told(slices):
    import os

    target = Target({}, np.zeros((8, 8), bool), 2.0, (1.0, 1.0), 0.1, 0.5)
    with Scorer(1) as scorer, pytest.raises(UserError, match="try fewer --workers"):
        for _ in range(1000):
            scorer.add([{}], [target], np.zeros((1, 1, 8, 8), bool))
            list(scorer.rows(wait=True))
            for process in scorer._pool._processes.values():
                os.kill(process.pid, 9)


def test_error_rates_of_models_with_known_answers(slices):
    """The small organ counts as small where the slice is large enough."""
    for entry in slices:  # 94 native pixels; under 0.2 % of a slice of 512 x 512
        assert entry.labels[2] < 0.002 * 512**2
    scores, _ = evaluate(slices, a=torch.zeros_like, b=lambda target: target)
    columns = {name: scores[name] for name in COLUMNS} | {"small": scores["label"] == "small"}
    table = table_two(Scores(columns), PROTOCOL)
    assert [row[2] for row in table.rows] == ["a", "b"]
    for row, expected in zip(table.rows, (1.0, 0.0), strict=True):
        assert [cell.value for cell in row[5:]] == [expected] * 3
        assert row[3:5] == ["4", "8"]  # patients, instances


def test_scores_of_several_processes_come_in_the_order_of_the_slices(slices):
    whole = evaluate(slices, target=lambda target: target)[0]
    parts = [
        evaluate(part, target=lambda target: target)[0] for part in (slices[1::2], slices[::2])
    ]
    order = [(entry.case, entry.index) for entry in slices]
    joined = Scores.join([*parts, Scores.of([])], order)  # the last process had nothing to do
    for column in COLUMNS:
        assert (joined[column] == whole[column]).all(), column


@pytest.mark.parametrize(("pixels", "small"), [(6, True), (8, False)])
def test_small_is_a_share_of_the_slice(slices, pixels, small):
    native = np.zeros((60, 60), np.uint8)  # 0.2 % of 3600 are 7.2
    native[0, :pixels] = 1
    target = evaluation.target_of(slices[0], 1, native, {"large": 2.0}, PROTOCOL, False)
    assert target.columns["pixels"] == pixels and target.columns["small"] == small


def test_an_error_is_a_leak_or_a_miss():
    """A target of 10 x 10 pixels of 1 mm."""
    mask = np.zeros((60, 60), bool)
    mask[20:30, 20:30] = True
    target = Target({}, mask, 2.0, (1.0, 1.0), PROTOCOL.error_leak, PROTOCOL.error_dsc)

    def error(rows: slice, columns: slice) -> float:
        prediction = np.zeros_like(mask)
        prediction[rows, columns] = True
        return target.score(prediction)["error"]

    assert error(slice(20, 30), slice(20, 30)) == 0
    assert error(slice(20, 30), slice(20, 32)) == 0  # two pixels over: within the tolerance
    assert error(slice(20, 30), slice(20, 33)) == 0  # 10 % beyond it, not more
    assert error(slice(20, 30), slice(20, 34)) == 1
    assert error(slice(20, 24), slice(20, 30)) == 0  # DSC 0.57
    assert error(slice(20, 23), slice(20, 30)) == 1  # DSC 0.46


def test_spacing_and_tolerance_are_millimetres(slices):
    """A target grown by one native pixel, 2 mm, is off by just that."""

    def grown(target):
        return torch.nn.functional.max_pool2d(target[None].float(), 21, 1, 10)[0] > 0

    inside, _ = evaluate(slices[:1], tolerance=3.0, grown=grown)
    outside, _ = evaluate(slices[:1], tolerance=1.0, grown=grown)
    assert mean(inside, "nsd") == 1 and mean(inside, "leak") == 0
    assert mean(outside, "nsd") < 0.4 and mean(outside, "leak") > 0.1


def test_spacing_is_in_the_order_of_the_axes(slices):
    """One native pixel is 2 mm along y and 1.6 mm along x."""

    def grown(size):
        padding = (size[0] // 2, size[1] // 2)
        return lambda target: (
            torch.nn.functional.max_pool2d(target[None].float(), size, 1, padding)[0] > 0
        )

    scores, _ = evaluate(slices[:1], tolerance=1.7, x=grown((1, 21)), y=grown((21, 1)))
    assert mean(scores, "nsd", model="x") == 1 and mean(scores, "leak", model="x") == 0
    assert mean(scores, "nsd", model="y") < 0.9 and mean(scores, "leak", model="y") > 0


def test_several_data_sets_are_kept_apart(toy_slices, tmp_path, fails):
    shutil.copytree(toy_slices, tmp_path / "other")
    datasets = [open_dataset(folder) for folder in (toy_slices, tmp_path / "other")]
    both = [entry for dataset in datasets for entry in dataset.split("all")]
    scores, _ = evaluate(both, target=lambda target: target)
    assert set(scores.distinct("label")) == {
        f"{label} ({data})" for label in ("large", "small") for data in ("toy", "other")
    }
    assert {case.split("/")[0] for case in scores.distinct("case")} == {"toy", "other"}
    one = scores.where(label="large (toy)")
    assert (one.patients, one.instances) == (4, 8)

    def all_for_training(meta: dict) -> None:
        for case in meta["cases"].values():
            case["split"] = "train"

    def other_patients(meta: dict) -> None:
        for number, case in enumerate(meta["cases"].values()):
            case["image_sha256"] = f"{number:064x}"

    arguments = ("--data", toy_slices, tmp_path / "other", "--models", "lite_medsam")
    arguments += ("--out", tmp_path / "out")
    edit_json(tmp_path / "other" / "dataset.json", all_for_training)
    assert "a patient in two splits" in fails(evaluation.main, *arguments)
    edit_json(tmp_path / "other" / "dataset.json", other_patients)
    assert "other: the test split is empty" in fails(evaluation.main, *arguments)


def test_pixels_are_native(slices):
    scores, _ = evaluate(slices, target=lambda target: target)
    for (case, index, label), rows in scores.group("case", "slice", "label").items():
        entry = next(s for s in slices if s.case == case and s.index == index)
        assert (rows["pixels"] == entry.labels[{"large": 1, "small": 2}[label]]).all()


# --- Boxes ---------------------------------------------------------------------------------------
def test_boxes_are_the_same_for_every_model_and_in_any_order(slices):
    _, known = evaluate(slices, a=lambda target: target, b=torch.zeros_like)
    _, reverse = evaluate(slices[::-1], a=lambda target: target)
    calls = len(known["a"].boxes) // len(slices)  # decoder calls of a slice
    backwards = [
        box
        for start in range(len(reverse["a"].boxes) - calls, -1, -calls)
        for box in reverse["a"].boxes[start : start + calls]
    ]
    for first, other, again in zip(known["a"].boxes, known["b"].boxes, backwards, strict=True):
        assert (first == other).all() and (first == again).all()


def boxes_of(entry, box: str, shift: str, draw: int = 0, seed: int = 0) -> np.ndarray:
    labels, tight, _ = evaluation.instances_of(entry)
    prompt = evaluation.Prompt(box, Shift.parse(shift), draw)
    return evaluation.boxes_of(entry, labels, tight, prompt, seed)


def test_boxes_of_an_instance_by_kind(slices):
    standard = boxes_of(slices[0], "standard", "0%")
    assert (standard == evaluation.instances_of(slices[0])[1]).all()
    outward = np.array([-1, -1, 1, 1])
    grown = (boxes_of(slices[0], "expansion", "15%") - standard) * outward
    shrunk = (boxes_of(slices[0], "shrink", "15%") - standard) * outward
    sides = np.tile(standard[:, 2:] - standard[:, :2] + 1, 2)
    assert (grown > 0).all() and (grown <= 0.15 * sides).all()
    assert shrunk == pytest.approx(-grown, abs=1e-3)
    half = (boxes_of(slices[0], "expansion", "7.5%") - standard) * outward
    assert half == pytest.approx(grown / 2, abs=1e-3)
    pixels = (boxes_of(slices[0], "expansion", "20px") - standard) * outward
    assert pixels == pytest.approx(grown / sides / 0.15 * 20, abs=1e-2)
    swept = (boxes_of(slices[0], "sweep", "-10%") - standard) * outward
    assert swept == pytest.approx(-0.1 * sides, abs=1e-3)


def test_every_instance_and_draw_has_boxes_of_its_own(slices):
    shares = []
    for entry in slices[:4]:
        standard = boxes_of(entry, "standard", "0%")
        sides = np.tile(standard[:, 2:] - standard[:, :2] + 1, 2)
        for draw in (0, 1):
            shares.append((boxes_of(entry, "expansion", "15%", draw) - standard) / sides)
    drawn = np.abs(np.concatenate(shares)).ravel()
    assert len(np.unique(drawn.round(5))) == len(drawn)
    first, second = (boxes_of(slices[0], "shrink", "15%", seed=seed) for seed in (0, 1))
    assert (first != second).all()


def test_decoder_calls_are_small_and_masks_come_in_order(slices):
    """Each set of boxes gets its own masks, however the calls are cut."""

    class Box:
        def decode(self, embedding, boxes):
            sizes.append(len(boxes))
            x = torch.arange(1024)
            inside = (x >= torch.tensor(boxes[:, :1])) & (x <= torch.tensor(boxes[:, 2:3]))
            return inside[:, None].float().expand(-1, 1024, -1) - 0.5

    sizes: list[int] = []
    entry = slices[0]
    sets = [boxes_of(entry, "sweep", f"{share}%") for share in range(-20, 21)]
    masks = np.concatenate(list(evaluation.predict(Box(), None, entry, sets)))
    assert max(sizes) <= evaluation.DECODE_BOXES and sum(sizes) == 2 * len(sets)
    for boxes, part in zip(sets, masks, strict=True):
        width = entry.frame.native[1] / entry.frame.content[1]
        expected = (boxes[:, 2] - boxes[:, 0] + 1) * width
        assert part.shape == (2, *entry.frame.native)
        assert part[:, 0].sum(axis=1) == pytest.approx(expected, abs=1.5)


# --- The script ----------------------------------------------------------------------------------
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
                *("--split", "all", "--slices", "1", "--shift", "10%", "20px", "--draws", "2"),
                *("--seed", "7"),
            ]
        )
    return out, text.getvalue()


def test_script_writes_all_of_the_report(results):
    out, printed = results
    tables = {f"table{n}.{suffix}" for n in (1, 2, 3) for suffix in ("md", "csv", "tex")}
    assert {path.name for path in out.iterdir()} == {
        *tables,
        *("report.md", "report.html", "instances.csv", "labels.csv", "comparisons.csv"),
        *("robustness.csv", "robustness_side.png", "robustness_px.png", "fig4.png", "fig6.png"),
    }  # no fig5: no instance is small
    text = (out / "report.md").read_text()
    assert "Table I. Boxes shifted by up to 10%." in printed and "Tight boxes: " in printed
    assert "The split is all: models were trained on these patients" in printed
    assert "4 patients, 8 instances" in text and "U(0, 10%)" in text and "2 draws" in text
    assert "(split all, at most 1 slices of each patient)" in text
    assert "policy of their boxes alone" in text
    assert "python eval.py --runs" in text and "--seed 7" in text
    html = (out / "report.html").read_text()
    assert html.count("<img") == 4 and 'src="data:image/png;base64,' in html
    assert "http" not in re.sub('src="data:[^"]*"', "", html)  # opens offline


def test_tables_can_be_recomputed_from_the_instances_in_ten_lines(results):
    out, _ = results
    with open(out / "instances.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
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
    average = np.mean([float(line["adaptive DSC"]) for line in table[:3]])
    assert float(table[3]["adaptive DSC"]) == pytest.approx(average, abs=1e-3)


def test_untouched_weights_are_a_column_and_differ_from_the_trained_ones(results):
    out, _ = results
    with open(out / "table1.csv") as file:
        first = next(csv.DictReader(file))
    assert len({first[f"{model} DSC"] for model in ("untouched", "medsam", "adaptive")}) == 3


def test_one_model_alone(toy_slices, tmp_path, capsys):
    """No comparison, no curve: the tables of one model."""
    evaluation.main(
        [
            *("--data", str(toy_slices), "--models", "lite_medsam", "--out", str(tmp_path)),
            *("--device", "cpu", "--shift", "15%", "--no-sweep", "--no-figures", "--slices", "1"),
        ]
    )
    assert "lite_medsam DSC" in capsys.readouterr().out
    assert not (tmp_path / "comparisons.csv").exists()
    assert not (tmp_path / "robustness.csv").exists() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("names", "options", "baseline", "proposed"),
    [
        (["untouched", "medsam", "adaptive", "sam2"], [], "medsam", "adaptive"),
        (["untouched", "x"], [], "untouched", "x"),
        (["adaptive", "plain"], [], "plain", "adaptive"),
        (["x", "medsam"], [], "x", "medsam"),
        (["x"], [], "x", "x"),
        (["x", "adaptive"], ["--baseline", "adaptive"], "adaptive", "x"),
        (["x", "adaptive"], ["--proposed", "x"], "adaptive", "x"),
    ],
)
def test_two_different_models_are_compared(toy_slices, names, options, baseline, proposed):
    args = evaluation.parse_args(["--models", "lite_medsam", *options])
    found = evaluation.protocol_of(args, [open_dataset(toy_slices)], [], names)
    assert (found.baseline, found.proposed) == (baseline, proposed)


def test_slices_are_spread_over_each_patient():
    class Dataset:
        def split(self, name):
            return [Entry(case, z) for case, n in (("a", 9), ("b", 2)) for z in range(n)]

    @dataclass
    class Entry:
        case: str
        index: int

    args = evaluation.parse_args(["--models", "lite_medsam", "--slices", "3"])
    chosen = [(entry.case, entry.index) for entry in evaluation.slices_of(Dataset(), args)]
    assert chosen == [("a", 1), ("a", 4), ("a", 7), ("b", 0), ("b", 1)]


def test_earlier_results_do_not_stay(toy_slices, tmp_path):
    for name in ("robustness.csv", "fig5.png", "comparisons.csv", "mine.txt"):
        (tmp_path / name).write_text("earlier")
    options = ["--no-sweep", "--no-figures", "--shift", "15%", "--device", "cpu"]
    evaluation.main(
        [*("--data", str(toy_slices), "--models", "lite_medsam"), "--out", str(tmp_path), *options]
    )
    left = {path.name for path in tmp_path.iterdir() if path.read_text() == "earlier"}
    assert left == {"mine.txt"}


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
    edit_json(changed, lambda config: config.update(start_weights=start_weights, data={"toy": "o"}))
    assert "changed since" in message("--runs", tmp_path / "copy")
    (tmp_path / "copy" / "adaptive" / "decoder_best.pth").unlink()
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
        edit_json(path, lambda config: config["options"].update(seed=1))
    runs = find_runs([ablation, tmp_path / "second"])
    assert [run.name for run in runs] == [
        *("ablation-medsam", "ablation-adaptive", "second-medsam", "second-adaptive")
    ]
    (told,) = differences(runs)
    assert told.startswith("seed (ablation-medsam: 0") and runs[0].epochs == 1
    path = tmp_path / "second" / "adaptive" / "config.json"
    edit_json(path, lambda config: config["constants"].update(MEDSAM_SHIFT=30))
    with open(tmp_path / "second" / "adaptive" / "log.csv", "a") as file:
        file.write("2\n")
    told = differences(find_runs([tmp_path / "second"]))
    assert [line.split(" (")[0] for line in told] == ["MEDSAM_SHIFT", "epochs trained"]


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
        (["--models", "=lite_medsam"], "expected NAME=MODEL"),
        (["--models", "unet"], "unknown model 'unet'"),
        (["--models", "lite_medsam", "lite_medsam"], "two models are named 'lite_medsam'"),
        (["--models", "lite_medsam:nowhere.pth"], "no such checkpoint"),
        (["--models", "lite_medsam", "--shift", "0.15"], "expected a share of the side like 15%"),
        (["--models", "lite_medsam", "--shift", "50%"], "less than half the side"),
        (["--models", "lite_medsam", "--shift", "-5%"], "must be more than 0"),
        (["--models", "lite_medsam", "--shift", "5%", "5%"], "given twice"),
        (["--models", "lite_medsam", "--draws", "0"], "--draws: must be 1 or more"),
        (["--models", "lite_medsam", "--slices", "0"], "--slices: must be 1 or more"),
        (["--models", "lite_medsam", "--baseline", "b"], "no model 'b' to compare"),
        (["--models", "../x=lite_medsam"], "NAME of letters"),
        ([], "give --runs DIR or --models"),
        (["--models", "lite_medsam", "--tolerance", "-1"], "--tolerance: expected mm"),
        (["--models", "lite_medsam", "--tolerance", "flare22"], "none for 'large'"),
        (["--models", "lite_medsam", "--split", "both"], "invalid choice: 'both'"),
    ],
)
def test_bad_options(fails, toy_slices, tmp_path, arguments, expected):
    message = fails(
        evaluation.main,
        "--data",
        toy_slices,
        "--out",
        tmp_path / "out",
        "--device",
        "cpu",
        *arguments,
    )
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_flare22_labels_and_tolerances():
    """The challenge's own: https://flare22.grand-challenge.org."""
    assert FLARE22_LABELS[2] == "right kidney" and FLARE22_LABELS[13] == "left kidney"
    assert FLARE22_LABELS[7] == "right adrenal gland" and FLARE22_LABELS[8] == "left adrenal gland"
    assert list(FLARE22_LABELS) == list(range(1, 14))
    in_order = [FLARE22_TOLERANCES_MM[name] for name in FLARE22_LABELS.values()]
    assert in_order == [5, 3, 3, 5, 2, 2, 2, 2, 2, 3, 5, 7, 3]


def test_labels_that_the_data_set_does_not_list_are_an_error(toy_slices, tmp_path):
    shutil.copytree(toy_slices, tmp_path / "copy")
    entry = open_dataset(tmp_path / "copy").split("all")[0]
    label_map = read_label_map(entry.label_path)
    for changed, expected in ((label_map * 3, "[3, 6]"), (label_map * 0, "[]")):
        np.save(entry.label_path, changed)
        with pytest.raises(UserError, match="changed or damaged"):
            evaluation.instances_of(entry)
        entry = replace(entry, label_sha256=sha256(entry.label_path))
        with pytest.raises(UserError, match="preprocess again") as error:
            evaluation.instances_of(entry)
        assert f"holds labels {expected}" in str(error.value)


def test_flare22_tolerances_go_by_organ(toy_slices):
    slices = open_dataset(toy_slices).split("all")
    with pytest.raises(UserError, match="give a number"):
        evaluation.tolerances_of("flare22", slices)
    slices[0].label_names.update({1: "liver", 2: "aorta"})  # the data set's, shared by its slices
    assert evaluation.tolerances_of("flare22", slices) == {"liver": 5, "aorta": 2}
