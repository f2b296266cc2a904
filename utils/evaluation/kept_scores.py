"""Scores kept on disk while an evaluation runs, so that an interrupted one goes on where it was.

`<out>/.scores/<key>/` holds a file for every patient that is finished. The key is a hash of all
that makes the scores, so they are never used in another evaluation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import perturb
from utils.data.slices import SliceDataset
from utils.evaluation.prompts import Protocol
from utils.evaluation.scoring import Row, Scores
from utils.system.files import atomic_write, read_bytes, sha256
from utils.training.runs import git_commit, versions

SCORES = ".scores"
Patient = tuple[str, str]  # data set, patient


class KeptScores:
    """The scores of the patients that are finished. Several processes may share the folder."""

    def __init__(self, out: Path, key: str) -> None:
        """`out` is the folder of the results, `key` as `scores_key` returns it."""
        self._all = out / SCORES
        self._folder = self._all / key

    def begin(self, patients: Collection[Patient]) -> None:
        """Discard the scores of another evaluation, and print where this one goes on.

        Args:
            patients: all that are evaluated, by any process.
        """
        if self.discard_others():
            print(f"{self._all}: discarded the scores of another evaluation that was interrupted")
        if done := self.count(patients):
            print(f"going on: {done} of {len(patients)} patients were scored before")

    def discard_others(self) -> bool:
        """Remove the scores of other evaluations; returns whether there were any."""
        others = [path for path in self._all.glob("*") if path != self._folder]
        for path in others:
            shutil.rmtree(path)
        return bool(others)

    def count(self, patients: Iterable[Patient]) -> int:
        """How many of `patients` are finished."""
        return sum(self._path(patient).is_file() for patient in patients)

    def read(self, patients: Iterable[Patient]) -> dict[Patient, Scores]:
        """The scores of those of `patients` that are finished; damaged ones are not."""
        scores = {}
        for patient in patients:
            if self._path(patient).is_file():
                try:
                    rows, volume_rows = json.loads(read_bytes(self._path(patient)))
                    scores[patient] = Scores([Row(*row) for row in rows], volume_rows)
                except (ValueError, TypeError):
                    continue
        return scores

    def write(self, patient: Patient, scores: Scores) -> None:
        """Keep the scores of a patient who is finished.

        Raises:
            UserError: the file cannot be written.
        """
        with atomic_write(self._path(patient), "w") as file:
            file.write(json.dumps(scores))  # floats keep every bit

    def remove(self) -> None:
        """Remove all of them, once the results are written."""
        shutil.rmtree(self._all, ignore_errors=True)

    def _path(self, patient: Patient) -> Path:
        return self._folder / f"{_hash(patient)}.json"  # a patient's name may be no file name


def scores_key(
    args: Namespace,
    protocol: Protocol,
    tolerances: dict[str, float],
    models: Sequence[tuple[str, str, str]],
    datasets: Sequence[SliceDataset],
    device: str,
) -> str:
    """A hash of all that makes the scores of a patient.

    Args:
        args: the options of eval.py.
        protocol, tolerances, datasets: as in eval.py.
        models: name, model and SHA-256 of the weights of each.
        device: its type.
    """
    # These make no score.
    words = {"data": "", "baseline": "", "proposed": "", "notes": (), "trainings": {}}
    return _hash(
        {
            "protocol": asdict(replace(protocol, **words)),
            "tolerances": tolerances,
            "models": models,
            "data": [(dataset.name, dataset.sha256) for dataset in datasets],
            "options": [args.split, args.slices, args.volume, args.cache, args.amp],
            "given": [sha256(path) for path in args.boxes or ()],
            "device": device,
            "boxes": sha256(perturb.__file__),  # which users edit between two commits
            "versions": versions(),
            "commit": git_commit(),
        }
    )


def _hash(value: object) -> str:
    """A short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
