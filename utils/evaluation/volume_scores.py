"""Per-slice masks stacked into volumes: scores in 3D, and label volumes to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from perturb import BOX_KINDS, Shift
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.data.volumes import write_volume
from utils.evaluation.inputs import case_name, label_text, patient_name
from utils.evaluation.metrics import bounding_window, dsc, nsd
from utils.evaluation.models import predict
from utils.evaluation.prompts import Prompt, Protocol
from utils.evaluation.statistics import estimate
from utils.evaluation.tables import Table
from utils.model.segmenter import Segmenter
from utils.system.errors import UserError
from utils.system.progress_bar import progress_bar


class VolumeScores:
    """DSC and NSD in 3D of every organ of every case, from masks that come slice by slice.

    A case's slices must come one after another, all of them. Between the first and the last slice
    with a label there must be no gap, and no mask may have been dropped when the case was
    preprocessed. Whether the slices are neighbours in the patient cannot be read from a file.
    """

    def __init__(
        self,
        datasets: Sequence[SliceDataset],
        slices: Sequence[Slice],
        tolerances: dict[str, float],
        shift: Shift,
    ) -> None:
        """Check the cases.

        Args:
            datasets: all that the slices are of.
            slices: those that will be added.
            tolerances: of NSD in mm, by label name.
            shift: of the expansion and shrink boxes whose first draw is scored.

        Raises:
            UserError: cases that are not contiguous and whole, by name.
        """
        self._datasets = {dataset.name: dataset for dataset in datasets}
        self._tolerances = tolerances
        self._several = len(datasets) > 1
        self._shift = shift
        indices = _indices(slices)
        every = _indices(entry for dataset in datasets for entry in dataset.split("all"))
        broken = []
        for (dataset, case), evaluated in indices.items():
            if evaluated != every[dataset, case]:
                broken.append(f"{case} (only some of its slices are evaluated)")
            elif len(evaluated) != max(evaluated) - min(evaluated) + 1:
                broken.append(f"{case} (gaps between its slices)")
            elif self._datasets[dataset].dropped_masks[case]:
                broken.append(f"{case} (small masks were dropped)")
        if broken:
            raise UserError(
                f"--volume: cannot be scored in 3D: {', '.join(broken)}; leave out --volume, or "
                "these cases"
            )
        self._slices_left = {key: len(evaluated) for key, evaluated in indices.items()}
        self._masks: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
        self._targets: dict[int, np.ndarray] = {}
        self._rows: list[dict] = []

    def add_masks(
        self,
        model: str,
        prompts: Sequence[Prompt],
        labels: Sequence[int],
        masks: np.ndarray,
        index: int,
    ) -> None:
        """Keep those of a slice's masks (P, K, H, W) whose prompts are scored in 3D."""
        for prompt, of_prompt in zip(prompts, masks, strict=True):
            shifted = prompt.box in BOX_KINDS[1:] and prompt.shift == self._shift
            if prompt.draw == 0 and (shifted or prompt.box == "standard"):
                for label, mask in zip(labels, of_prompt, strict=True):
                    # One bit per pixel: a case has models x boxes x labels x slices of them.
                    by_slice = self._masks.setdefault((model, prompt.box, label), {})
                    by_slice[index] = np.packbits(mask)

    def finish_slice(self, entry: Slice, native: np.ndarray) -> None:
        """Add the label map (H, W) of a slice whose masks are all there; scores a complete case."""
        self._targets[entry.index] = native
        key = (entry.dataset, entry.case)
        self._slices_left[key] -= 1
        if not self._slices_left[key]:
            self._score(entry)
            self._masks, self._targets = {}, {}

    def finish(self) -> list[dict]:
        """The rows of volumes.csv of the cases that were completed since the last call."""
        rows, self._rows = self._rows, []
        return rows

    def _score(self, entry: Slice) -> None:
        """Score the case that `entry` is the last slice of."""
        spacing = self._datasets[entry.dataset].geometry[entry.case].spacing_mm
        order = sorted(self._targets)
        label_map = np.stack([self._targets[index] for index in order])
        for (model, box, label), by_slice in self._masks.items():
            prediction = np.zeros(label_map.shape, bool)
            for z, index in enumerate(order):
                if index in by_slice:
                    bits = np.unpackbits(by_slice[index], count=label_map[z].size)
                    prediction[z] = bits.reshape(label_map[z].shape)
            target = label_map == label
            window = bounding_window(prediction | target)
            prediction, target = prediction[window], target[window]
            tolerance = self._tolerances[label_name(entry.label_names, label)]
            self._rows.append(
                {
                    "model": model,
                    "patient": patient_name(entry, self._several),
                    "case": case_name(entry, self._several),
                    "label": label_text(entry, label, self._several),
                    "box": box,
                    "voxels": int(target.sum()),
                    "dsc": dsc(prediction, target),
                    "nsd": nsd(prediction, target, tolerance, spacing),
                }
            )


def volume_frame(rows: Sequence[dict]) -> pd.DataFrame:
    """volumes.csv: one row per model, case, label and box kind, scores in 0-1, sorted by case."""
    return pd.DataFrame(rows).sort_values("case", kind="stable", ignore_index=True)


def volume_table(scores: pd.DataFrame, protocol: Protocol) -> Table:
    """The means per label and model, and over all labels, two columns per box kind."""
    rows = []
    labels = [*scores["label"].unique(), "all"]
    for label in labels:
        of_label = scores if label == "all" else scores[scores["label"] == label]
        for model, organs in of_label.groupby("model", sort=False):
            row = {
                "label": label,
                "model": model,
                "patients": str(organs["patient"].nunique()),
                "organs": str(len(organs[["case", "label"]].drop_duplicates())),
            }
            for kind in BOX_KINDS:
                part = organs[organs["box"] == kind]
                for score in ("dsc", "nsd"):
                    row[f"{kind} {score.upper()}"] = estimate(
                        part[score], part["patient"], len(part)
                    )
            rows.append(row)
    return Table(
        "DSC and NSD of whole organs in 3D, %.",
        f"Per-slice masks stacked; {protocol.data}. Every slice that holds the organ has a box and "
        "no other slice has one, so the organ's extent along z is given. NSD at "
        f"{protocol.tolerance}; means over organs of cases, with 95 % intervals by bootstrap where "
        "there are enough patients. Expansion and shrink: each edge by up to "
        f"{protocol.shifts[0]}, one draw.",
        pd.DataFrame(rows),
        digits=1,
    )


def _indices(slices: Iterable[Slice]) -> dict[tuple[str, str], set[int]]:
    """The z of the slices of each (data set, case)."""
    indices: dict[tuple[str, str], set[int]] = {}
    for entry in slices:
        indices.setdefault((entry.dataset, entry.case), set()).add(entry.index)
    return indices


def save_predictions(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    datasets: Sequence[SliceDataset],
    slices: Sequence[Slice],
    folder: Path,
    amp: torch.dtype | None = None,
) -> None:
    """Write folder/<model>/<case>.nii.gz: labels predicted from tight boxes, on the source's grid.

    Where masks overlap, the label with the larger logit wins. Slices that are not among `slices`
    stay 0.
    """
    geometry = {(d.name, case): g for d in datasets for case, g in d.geometry.items()}
    cases: dict[tuple[str, str], list[Slice]] = {}
    for entry in slices:
        cases.setdefault((entry.dataset, entry.case), []).append(entry)
    for key, entries in progress_bar(cases.items(), unit="case", desc="predicting"):
        for name, model in models.items():
            volume = np.zeros(geometry[key].shape, np.uint8)
            for entry in entries:
                volume[entry.index] = _predicted_labels(model, embeddings[name](entry), entry, amp)
            of_dataset = folder / name / entry.dataset if len(datasets) > 1 else folder / name
            write_volume(of_dataset / f"{entry.case}.nii.gz", volume, geometry[key])


def _predicted_labels(
    model: Segmenter, embedding: torch.Tensor, entry: Slice, amp: torch.dtype | None
) -> np.ndarray:
    """The label map (H, W) uint8, native pixels, that a model makes of a slice's tight boxes."""
    _, labels, boxes = read_instances(entry)
    logits = predict(model, embedding, boxes, entry.frame, amp)
    largest, winner = (part.cpu().numpy() for part in logits.max(dim=0))
    return np.where(largest > 0, labels[winner], 0).astype(np.uint8)
