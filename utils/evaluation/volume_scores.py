"""Per-slice masks stacked into volumes: scores in 3D, and label volumes to look at."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perturb import BOX_KINDS
from utils.data.labels import label_name
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.evaluation.metrics import bounding_window, dsc, nsd
from utils.system import distributed
from utils.system.errors import UserError
from utils.system.files import atomic_write

if TYPE_CHECKING:
    import torch

    from utils.evaluation.comparisons import Protocol
    from utils.evaluation.tables import Table
    from utils.model.segmenter import Segmenter


class VolumeScores:
    """DSC and NSD in 3D of every organ of every case, from masks that come slice by slice.

    A case's slices must come one after another, all of them. Between the first and the last slice
    with a label there must be no gap, and no mask may have been dropped when the case was
    preprocessed. That its slices really are neighbours in the patient cannot be told from the file.
    """

    def __init__(
        self,
        datasets: Sequence[SliceDataset],
        slices: Sequence[Slice],
        tolerances: dict[str, float],
    ) -> None:
        """Check the cases.

        Args:
            datasets: all that the slices are of.
            slices: those that will be added.
            tolerances: of NSD in mm, by label name.

        Raises:
            UserError: cases that are not contiguous and whole, by name.
        """
        self._datasets = {dataset.name: dataset for dataset in datasets}
        self._tolerances = tolerances
        self._several = len(datasets) > 1
        indices = _indices(slices)
        every = _indices(entry for dataset in datasets for entry in dataset.split("all"))
        broken = []
        for (dataset, case), found in indices.items():
            if found != every[dataset, case]:
                broken.append(f"{case} (only some of its slices are evaluated)")
            elif len(found) != max(found) - min(found) + 1:
                broken.append(f"{case} (gaps between its slices)")
            elif self._datasets[dataset].dropped_masks[case]:
                broken.append(f"{case} (small masks were dropped)")
        if broken:
            raise UserError(
                f"--volume: cannot be scored in 3D: {', '.join(broken)}; leave out --volume, or "
                "these cases"
            )
        self._left = {key: len(found) for key, found in indices.items()}
        self._masks: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
        self._targets: dict[int, np.ndarray] = {}
        self._rows: list[dict] = []

    def add(
        self,
        entry: Slice,
        native: np.ndarray,
        labels: Sequence[int],
        masks: dict[tuple[str, str], np.ndarray],
    ) -> None:
        """Add one slice: its label map (H, W), and by (model, box) the masks (K, H, W) of `labels`.

        The case is scored when it is complete.
        """
        self._targets[entry.index] = native
        for (model, box), part in masks.items():
            for label, mask in zip(labels, part, strict=True):
                # A bit a pixel: a case has models x boxes x labels x slices of them.
                self._masks.setdefault((model, box, label), {})[entry.index] = np.packbits(mask)
        key = (entry.dataset, entry.case)
        self._left[key] -= 1
        if not self._left[key]:
            self._score(entry)
            self._masks, self._targets = {}, {}

    def _score(self, entry: Slice) -> None:
        """Score the case that `entry` is the last slice of."""
        spacing = self._datasets[entry.dataset].geometry[entry.case].spacing_mm
        order = sorted(self._targets)
        label_map = np.stack([self._targets[index] for index in order])
        suffix = f" ({entry.dataset})" if self._several else ""
        for (model, box, label), by_slice in self._masks.items():
            prediction = np.zeros(label_map.shape, bool)
            for z, index in enumerate(order):
                if index in by_slice:
                    bits = np.unpackbits(by_slice[index], count=label_map[z].size)
                    prediction[z] = bits.reshape(label_map[z].shape)
            target = label_map == label
            window = bounding_window(prediction | target)
            prediction, target = prediction[window], target[window]
            name = label_name(entry.label_names, label)
            self._rows.append(
                {
                    "model": model,
                    "case": f"{entry.dataset}/{entry.case}" if self._several else entry.case,
                    "label": name + suffix,
                    "box": box,
                    "voxels": int(target.sum()),
                    "dsc": dsc(prediction, target),
                    "nsd": nsd(prediction, target, self._tolerances[name], spacing),
                }
            )

    def join(self, parts: Sequence[list[dict]]) -> None:
        """Have the rows of several processes, by case."""
        together = (row for part in parts for row in part)
        self._rows = sorted(together, key=lambda row: row["case"])

    @property
    def rows(self) -> list[dict]:
        """One dict per model, case, label and kind of box; scores in 0-1."""
        return self._rows

    def write(self, path: Path) -> None:
        """Write volumes.csv: the rows."""
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, list(self._rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)

    def table(self, protocol: Protocol) -> Table:
        """The means per model and label, a column pair a kind of box."""
        from utils.evaluation.statistics import estimate
        from utils.evaluation.tables import Table

        groups: dict[tuple[str, str], list[dict]] = {}
        for row in self._rows:
            for label in (row["label"], "all"):
                groups.setdefault((label, row["model"]), []).append(row)
        lines: list[list] = []
        for (label, model), rows in sorted(groups.items(), key=lambda item: item[0][0] == "all"):
            cells: list = [label, model, str(len({row["case"] for row in rows}))]
            cells.append(str(len({(row["case"], row["label"]) for row in rows})))
            for kind in BOX_KINDS:
                of_kind = [row for row in rows if row["box"] == kind]
                cases = [row["case"] for row in of_kind]
                for score in ("dsc", "nsd"):
                    values = [row[score] for row in of_kind]
                    cells.append(estimate(values, cases, len(values)))
            lines.append(cells)
        return Table(
            "DSC and NSD of whole organs in 3D, %.",
            f"Per-slice masks stacked; {protocol.what}. There is a box in every slice that holds "
            "the organ and in no other, so where it begins and ends along z is given. NSD at "
            f"{protocol.tolerance}; means over organs of cases, with 95 % intervals by bootstrap "
            f"where there are patients enough. Expansion and shrink: each edge by up to "
            f"{protocol.shifts[0]}, one draw.",
            ["label", "model", "patients", "organs"]
            + [f"{kind} {score}" for kind in BOX_KINDS for score in ("DSC", "NSD")],
            lines,
            digits=1,
        )


def _indices(slices: Iterable[Slice]) -> dict[tuple[str, str], set[int]]:
    """The z of the slices of each (data set, case)."""
    found: dict[tuple[str, str], set[int]] = {}
    for entry in slices:
        found.setdefault((entry.dataset, entry.case), set()).add(entry.index)
    return found


def save_predictions(
    models: dict[str, Segmenter],
    embeddings: dict[str, Callable[[Slice], torch.Tensor]],
    datasets: Sequence[SliceDataset],
    slices: Sequence[Slice],
    folder: Path,
) -> None:
    """Write folder/<model>/<case>.nii.gz: labels predicted from tight boxes, on the source's grid.

    Where masks overlap, the label of the larger logit has the voxel. Slices that are not among
    `slices` stay 0.
    """
    from tqdm import tqdm

    from utils.data.volumes import write_label_map

    geometry = {(d.name, case): g for d in datasets for case, g in d.geometry.items()}
    cases: dict[tuple[str, str], list[Slice]] = {}
    for entry in slices:
        cases.setdefault((entry.dataset, entry.case), []).append(entry)
    quiet = None if distributed.rank() == 0 else True
    for key, entries in tqdm(cases.items(), unit="case", desc="predictions", disable=quiet):
        for name, model in models.items():
            volume = np.zeros(geometry[key].shape, np.uint8)
            for entry in entries:
                volume[entry.index] = predicted_labels(model, embeddings[name](entry), entry)
            of_dataset = folder / name / entry.dataset if len(datasets) > 1 else folder / name
            write_label_map(of_dataset / f"{entry.case}.nii.gz", volume, geometry[key])


def predicted_labels(model: Segmenter, embedding: torch.Tensor, entry: Slice) -> np.ndarray:
    """The label map (H, W) uint8, native pixels, that a model makes of a slice's tight boxes."""
    import torch

    _, labels, boxes = read_instances(entry)
    with torch.no_grad():
        logits = entry.frame.logits_to_native(model.decode(embedding, boxes))
        largest, which = (part.cpu().numpy() for part in logits.max(dim=0))
    return np.where(largest > 0, labels[which], 0).astype(np.uint8)
