"""The metrics, the scoring loop on models with known answers, and what an interruption leaves."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy import ndimage

import eval as evaluation
import perturb
from perturb import BOX_KINDS, LIKE, LOOSE, Shift
from tests.evaluation.helpers import evaluate, known, mean, protocol, where
from utils.evaluation.models import scores_key
from utils.evaluation.options import parse_options
from utils.evaluation.prompts import Prompt, by_patient
from utils.evaluation.scoring import (
    SCORES,
    KeptScores,
    Scorer,
    Target,
    dsc,
    leak,
    nsd,
    targets_of,
    tolerance_text,
    tolerances_of,
)
from utils.evaluation.statistics import count_instances, count_patients, to_frame
from utils.system import UserError
from utils.system.command_line import run

STANDARD = ("standard", "0%", 0)


def same(target):
    return target


def test_models_with_known_answers(slices):
    scores, _ = evaluate(
        slices,
        target=same,
        nothing=torch.zeros_like,
        half=lambda target: target & (torch.arange(1024) < target.any(0).nonzero().median()),
        everything=torch.ones_like,
    )
    prompts = 1 + 2 * 2 * 2 + 2 * 3 + 4  # standard; kinds, shifts, draws; loose, like; the sweep
    assert len(scores) == 4 * len(slices) * 2 * prompts  # models, slices, labels
    assert set(scores["box"]) == {*BOX_KINDS, LOOSE, *LIKE, "sweep"}
    for model, expected in (("target", [1, 1, 0, 0]), ("nothing", [0, 0, 0, 1])):
        found = where(scores, model=model)[["dsc", "nsd", "leak", "error"]]
        assert (found == expected).all(axis=None)
    assert mean(scores, "dsc", model="half") == pytest.approx(2 / 3, abs=0.08)
    assert (where(scores, model="everything")["error"] == 1).all()


def test_each_prompt_gets_its_own_masks(slices):
    """A model that fills its box: the more the box grows, the more it leaks."""

    def fill(embedding, boxes):
        masks = torch.full((len(boxes), 1024, 1024), -0.5)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().astype(int), strict=True):
            mask[y0 : y1 + 1, x0 : x1 + 1] = 0.5
        return masks

    models = known(fill=None)
    models["fill"].segmenter.decode = fill
    sweep = tuple(Shift.parse(f"{share}%") for share in range(-20, 21, 2) if share)
    tolerances = {"large": 2, "small": 2}
    patients = evaluation.evaluate(models, slices[:2], protocol(sweep=sweep), tolerances)
    rows = [row for _, scores in patients for row in scores.rows]
    leaks = [mean(to_frame(rows), "leak", box="sweep", shift=str(shift)) for shift in sweep]
    assert leaks == sorted(leaks) and leaks[0] < leaks[-1]


def test_worker_processes_give_the_same_rows_in_the_same_order(slices):
    answers = {"half": lambda target: target & (torch.rand(1024) < 0.5), "all": torch.ones_like}
    frames = []
    for workers in (0, 2):
        torch.manual_seed(0)
        frames.append(evaluate(slices, workers=workers, **answers)[0])
    pd.testing.assert_frame_equal(*frames)


def test_a_worker_imports_no_network():
    code = (
        "import sys, utils.evaluation.scoring; sys.exit(bool({'torch', 'pandas'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Fatal(Target):
    def score(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_reported():
    one = Fatal(("d", "p", "p", 0, "x", 1), np.zeros((8, 8), bool), 2.0, (1.0, 1.0))
    prompt = Prompt("standard", Shift(0.0, "side"))
    with pytest.raises(UserError, match="try fewer --workers"), Scorer(1) as scorer:
        scorer.submit("m", [prompt], [one], np.zeros((1, 1, 8, 8), bool))
        scorer.finish()


@pytest.mark.parametrize(("pixels", "small"), [(6, True), (8, False)])
def test_small_is_a_share_of_the_slice(slices, pixels, small):
    native = np.zeros((60, 60), np.uint8)  # 0.2 % of 3600 are 7.2
    native[0, :pixels] = 1
    (one,) = targets_of(slices[0], np.array([1]), native, {"large": 2.0})
    row = one.score("m", STANDARD, native == 1)
    assert row.pixels == pixels and row.small == small


@pytest.mark.parametrize(
    ("bottom", "right", "error"),
    [
        *((30, 30, 0), (30, 32, 0)),  # two pixels over: within the tolerance
        *((30, 33, 0), (30, 34, 1)),  # 10 % of the area beyond it, and more
        *((24, 30, 0), (23, 30, 1)),  # DSC 0.57 and 0.46
    ],
)
def test_an_error_is_a_leak_or_a_miss(bottom, right, error):
    """Of a target of 10 x 10 pixels of 1 mm."""
    mask, prediction = np.zeros((2, 60, 60), bool)
    mask[20:30, 20:30] = prediction[20:bottom, 20:right] = True
    target = Target(("d", "p", "p", 0, "x", 1), mask, 2.0, (1.0, 1.0))
    assert target.score("m", STANDARD, prediction).error == error


def grown(height: int, width: int):
    """An answer that is the target grown by half of height and width, 1024-frame pixels."""
    padding = (height // 2, width // 2)
    return lambda target: (
        torch.nn.functional.max_pool2d(target[None].float(), (height, width), 1, padding)[0] > 0
    )


def test_spacing_and_tolerance_are_millimetres_in_the_order_of_the_axes(slices):
    """One native pixel is 2 mm along y and 1.6 mm along x; a target is grown by one."""
    inside, _ = evaluate(slices[:1], tolerance=3.0, grown=grown(21, 21))
    outside, _ = evaluate(slices[:1], tolerance=1.0, grown=grown(21, 21))
    assert mean(inside, "nsd") == 1 and mean(inside, "leak") == 0
    assert mean(outside, "nsd") < 0.4 and mean(outside, "leak") > 0.1
    scores, _ = evaluate(slices[:1], tolerance=1.7, x=grown(1, 21), y=grown(21, 1))
    assert mean(scores, "nsd", model="x") == 1 and mean(scores, "leak", model="x") == 0
    assert mean(scores, "nsd", model="y") < 0.9 and mean(scores, "leak", model="y") > 0


def test_instances_are_named_and_counted_in_native_pixels(slices):
    twins = [replace(sample, dataset="other", patient="twin") for sample in slices[:2]]
    scores, _ = evaluate([*slices, *twins], target=same)
    samples = {(sample.case, sample.index): sample for sample in slices}
    for row in scores.itertuples():
        sample = samples[row.case, row.slice]
        assert row.pixels == sample.labels[{"large": 1, "small": 2}[row.label]]
    assert set(scores["dataset"]) == {"toy", "other"}
    assert set(where(scores, dataset="other")["patient"]) == {"twin"}
    assert (count_patients(scores), count_instances(scores)) == (5, 20)


def test_tolerances_go_by_organ_and_units_by_what_is_known(slices):
    def text(*samples, words=""):
        return tolerance_text(parse_options(["--models", "lite_medsam", *words.split()]), samples)

    with pytest.raises(UserError, match="none for 'large'; give one in mm"):
        tolerances_of("flare22", slices)
    slices[0].label_names.update({1: "liver", 2: "aorta"})  # the data set's, shared by its slices
    assert tolerances_of("flare22", slices) == {"liver": 5, "aorta": 2}
    unknown = replace(slices[0], spacing_mm=None)
    assert text(*slices, words="--volume --tolerance 2.5") == "2.5 mm"
    assert text(*slices, words="--tolerance flare22") == "FLARE22's tolerances"
    assert text(unknown).startswith("2 pixels of the slices")


def blob(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=shape), 2.5)
    mask = smooth > np.quantile(smooth, 0.8)
    mask[(slice(0, 1),) * mask.ndim] = False
    return np.pad(mask, 2)


def test_dsc_by_hand():
    target, prediction = np.zeros((4, 4), bool), np.zeros((4, 4), np.uint8)
    target[:2] = True  # 8 pixels
    prediction[1:, 0] = 1  # 3 pixels, one shared
    assert dsc(prediction, target) == pytest.approx(2 * 1 / 11)
    assert dsc(target, target) == 1 and dsc(~target, target) == 0


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)])
def test_empty_masks(shape):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    spacing = (1.0,) * len(shape)
    assert dsc(empty, empty) == 1 and nsd(empty, empty, 1, spacing) == 1
    assert dsc(empty, full) == 0 and nsd(empty, full, 1, spacing) == 0
    assert dsc(full, empty) == 0 and nsd(full, empty, 1, spacing) == 0


@pytest.mark.parametrize("tolerance", [0.0, 0.9, 1.7, 3.0])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 40), (1.0, 1.0)), ((40, 48), (0.7, 1.3)), ((12, 20, 18), (2.5, 0.8, 1.1))],
)
def test_nsd_is_monai_with_subvoxels(shape, spacing, tolerance):
    for seed in range(3):
        prediction, target = blob(shape, seed), blob(shape, seed + 100)
        target |= np.roll(prediction, 1, axis=0)
        both = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, target)]
        options = {"include_background": True, "use_subvoxels": True, "spacing": list(spacing)}
        expected = compute_surface_dice(*both, [tolerance], **options).item()
        assert nsd(prediction, target, tolerance, spacing) == pytest.approx(expected, abs=1e-6)


def test_leak_by_hand():
    """A target of 4 x 5 pixels of 2 x 1 mm; distances are between pixel centres."""
    empty = np.zeros((20, 20), bool)
    target, wider, higher, far = (empty.copy() for _ in range(4))
    target[8:12, 5:10] = True
    wider[8:12, 5:13] = True  # three columns more: 1, 2 and 3 mm off
    higher[8:14, 5:10] = True  # two rows more: 2 and 4 mm off
    far[0, 0] = True  # what is missed does not matter
    for mask, tolerance, pixels in (
        *((target, 0.0, 0), (empty, 0.0, 0), (wider, 2.0, 4), (wider, 3.0, 0)),
        *((higher, 2.0, 5), (far, 5.0, 1)),
    ):
        assert leak(mask, target, tolerance, (2, 1)) == pixels / 20
    assert leak(empty, empty, 1.0, (1, 1)) == 0 and leak(far, empty, 1.0, (1, 1)) == float("inf")
    for metric in (dsc, nsd, leak):
        with pytest.raises(ValueError, match="differ in shape"):
            metric(target, np.eye(5), *(() if metric is dsc else (1.0, (1, 1))))


def test_damaged_scores_are_made_again_and_those_of_another_evaluation_discarded(
    slices, tmp_path, capsys
):
    path, patients = tmp_path / SCORES, list(by_patient(slices))
    kept = KeptScores(tmp_path, "key")
    tolerances = tolerances_of(2.0, slices)
    whole = dict(evaluation.evaluate(known(m=same), slices, protocol(), tolerances))
    for patient, scores in whole.items():
        kept.append(patient, scores)
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    (tmp_path / "predictions").mkdir()
    (tmp_path / "fig4.png").write_text("unfinished")
    kept = KeptScores(tmp_path, "key")
    assert list(kept.by_patient) == patients[:3]
    assert [file.name for file in tmp_path.iterdir()] == [SCORES]
    kept.append(patients[3], whole[patients[3]])
    assert path.read_bytes() == content
    kept = KeptScores(tmp_path, "key")
    assert kept.joined().rows == [row for scores in whole.values() for row in scores.rows]
    assert "discarded" not in capsys.readouterr().out
    assert KeptScores(tmp_path, "other").by_patient == {}
    assert "discarded the scores of another evaluation" in capsys.readouterr().out


def test_scores_belong_to_what_made_them(dataset, tmp_path, monkeypatch):
    def key(words="", weights="w", name="m", data=dataset) -> str:
        options = parse_options(["--models", "lite_medsam", *words.split()])
        return scores_key(options, {name: weights}, [data])

    assert key() == key("--baseline x --no-figures --workers 3 --out y --overwrite")
    keys = [
        *(key(), key("--amp bf16"), key("--slices 3"), key("--split all"), key("--volume")),
        *(key("--tolerance 3"), key(weights="other"), key(name="other"), key("--seed 1")),
        *(key("--draws 2"), key("--shift 10%"), key("--no-sweep")),
        key(data=replace(dataset, sha256="other")),
    ]
    for text in ("one reader", "another reader"):
        (tmp_path / "boxes.csv").write_text(text)
        keys.append(key(f"--boxes {tmp_path / 'boxes.csv'}"))
    (tmp_path / "perturb.py").write_text("edited")
    monkeypatch.setattr(perturb, "__file__", str(tmp_path / "perturb.py"))
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_script_goes_on_with_the_same_command(toy_slices, tmp_path, monkeypatch, capfd, workers):
    calls, stop_at = 0, None

    def interrupted(target):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return target

    monkeypatch.setattr(evaluation, "load_models", lambda *_: known(lite_medsam=interrupted))
    monkeypatch.setattr(evaluation, "provenance", lambda *_: "")

    def options(out):
        words = ["--data", str(toy_slices), "--models", "lite_medsam", "--out", str(out)]
        words += ["--device", "cpu", "--split", "all", "--volume", "--workers", workers]
        return parse_options([*words, "--shift", "15%", "--no-sweep", "--no-figures"])

    evaluation.main(options(tmp_path / "whole"))
    per_patient, calls, out = calls // 4, 0, tmp_path / "out"
    stop_at = per_patient + 1
    with pytest.raises(SystemExit) as stop:
        run(evaluation.main, options(out))
    assert stop.value.code == 130
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"interrupted; .*; go on with: python eval.py --data \S+ --models", said)
    assert not out.exists()
    assert [path.name for path in (tmp_path / ".out.partial").iterdir()] == [SCORES]

    stop_at, calls = None, 0
    evaluation.main(options(out))
    assert calls == 3 * per_patient
    assert "resuming: 1 of 4 patients are already scored" in capfd.readouterr().out
    for name in ("instances.csv", "volumes.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    assert not (out / SCORES).exists()
