"""An interrupted evaluation goes on where it was."""

import os
import re
import signal
from dataclasses import replace

import pandas as pd
import pytest

import eval as evaluation
from perturb import Shift
from tests.evaluation.helpers import KnownAnswer, evaluate, label_map_of, protocol
from utils.data.slices import open_dataset, read_label_map
from utils.evaluation.inputs import by_patient
from utils.evaluation.kept_scores import SCORES, KeptScores, scores_key
from utils.system.command_line import run
from utils.system.signals import Interrupted


@pytest.fixture
def slices(toy_slices):
    """One of each of four patients."""
    return [entries[0] for entries in by_patient(open_dataset(toy_slices).split("all")).values()]


def same(target):
    return target


@pytest.mark.parametrize("workers", [0, 2])
def test_patients_that_are_finished_are_not_decoded_again(slices, tmp_path, workers):
    """The second patient was finished by another process of several, the first before Ctrl-C."""
    whole, _ = evaluate(slices, model=same)
    kept = KeptScores(tmp_path, "key")
    evaluate(slices[1:2], kept=kept, model=same)
    decoded = 0

    def interrupted_at_third(target):
        nonlocal decoded
        decoded += 1
        if target.sum() == targets[2]:
            os.kill(os.getpid(), signal.SIGINT)
        return target

    targets = [int(pixels) for pixels in map(pixels_of_first_label, slices)]
    assert len(set(targets)) == 4
    with pytest.raises(Interrupted):
        evaluate(slices, workers=workers, kept=kept, model=interrupted_at_third)
    per_slice = decoded // 2  # of the first and the third
    assert kept.count(by_patient(slices)) == 3  # what was begun is finished

    decoded = 0
    targets[2] = -1
    scores, _ = evaluate(slices, workers=workers, kept=kept, model=interrupted_at_third)
    assert decoded == per_slice
    pd.testing.assert_frame_equal(scores, whole)
    assert scores.to_csv() == whole.to_csv()  # to the last bit


def pixels_of_first_label(entry) -> int:
    return (read_label_map(entry.label_path) == min(entry.labels)).sum()


def test_damaged_scores_are_made_again_and_those_of_another_evaluation_discarded(slices, tmp_path):
    kept = KeptScores(tmp_path, "key")
    patients = by_patient(slices[:1])
    scores, _ = evaluate(slices[:1], kept=kept, model=same)
    (file,) = (tmp_path / SCORES / "key").iterdir()
    for content in (file.read_bytes()[:-9], b"[[[1, 2]], []]", b"\xff", b"null"):
        file.write_bytes(content)
        assert kept.read(patients) == {}
    again, _ = evaluate(slices[:1], kept=kept, model=same)
    pd.testing.assert_frame_equal(again, scores)

    assert not kept.discard_others() and len(kept.read(patients)) == 1
    other = KeptScores(tmp_path, "other")
    assert other.read(patients) == {} and other.discard_others()
    assert kept.read(patients) == {}
    kept.remove()
    assert not (tmp_path / SCORES).exists()


def test_scores_belong_to_what_made_them(toy_slices, tmp_path, monkeypatch):
    dataset = open_dataset(toy_slices)

    def key(options="", tolerance=2.0, weights="w", name="m", data=dataset, device="cpu", **how):
        args = evaluation.parse_args(["--models", "lite_medsam", *options.split()])
        models = [(name, "lite_medsam", weights)]
        return scores_key(args, protocol(**how), {"a": tolerance}, models, [data], device)

    assert key() == key(baseline="x", proposed="y", notes=("z",), data=dataset)
    keys = [
        *(key(), key("--amp bf16"), key("--slices 3"), key("--split all"), key("--volume")),
        *(key(tolerance=3.0), key(weights="other"), key(name="other"), key(device="cuda")),
        *(key(seed=1), key(draws=2), key(shifts=(Shift(0.1, "side"),)), key(sweep=())),
        key(data=replace(dataset, sha256="other")),
    ]
    for text in ("one reader", "another reader"):
        (tmp_path / "boxes.csv").write_text(text)
        keys.append(key(f"--boxes {tmp_path / 'boxes.csv'}"))
    for fact in ("git_commit", "sha256"):  # of the checkout, and of perturb.py
        monkeypatch.setattr(f"utils.evaluation.kept_scores.{fact}", lambda *_: "other")
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_script_goes_on_with_the_same_command(toy_slices, tmp_path, monkeypatch, capfd):
    calls = 0

    def interrupted(target):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return target

    model = KnownAnswer(interrupted)
    loaded = ({"lite_medsam": model}, {"lite_medsam": label_map_of})
    monkeypatch.setattr("utils.evaluation.models.load_models", lambda *_: loaded)

    def arguments(out) -> list[str]:
        return [
            *("--data", str(toy_slices), "--models", "lite_medsam", "--out", str(out)),
            *("--device", "cpu", "--split", "all", "--volume"),
            *("--shift", "15%", "--no-sweep", "--no-figures"),
        ]

    stop_at = None
    evaluation.main(arguments(tmp_path / "whole"))
    per_patient, calls = calls // 4, 0
    stop_at = per_patient + 1
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(lambda: evaluation.main(arguments(out)))
    assert stop.value.code == 130
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"interrupted; .*; go on with: python eval.py --data \S+ --models", said)
    assert [path.name for path in out.iterdir()] == [SCORES]

    stop_at, calls = None, 0
    monkeypatch.setattr("utils.system.progress_bar.LINE_SECONDS", 0)
    evaluation.main(arguments(out))
    assert calls == 3 * per_patient
    said = capfd.readouterr()
    assert "going on: 1 of 4 patients were scored before" in said.out
    lines = re.findall("evaluating: . of 8 slices", said.err)
    assert lines[0].startswith("evaluating: 2") and lines[-1].startswith("evaluating: 8")
    for name in ("instances.csv", "volumes.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / SCORES).exists()
