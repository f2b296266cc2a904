"""Per-slice masks stacked into volumes: scores in 3D, and label volumes to look at."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import find_objects

from perturb import LIKE, LOOSE, Shift
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.data.volumes import write_volume
from utils.evaluation.interpolation import Box, Track, propagate
from utils.evaluation.models import Predictor
from utils.evaluation.prompts import GIVEN, TIGHT, Prompt
from utils.evaluation.scoring import Target, dsc, nsd
from utils.system import UserError
from utils.system.loops import progress_bar

IN_2D = (LOOSE, *LIKE, "sweep", GIVEN)  # boxes that are scored slice by slice alone


class VolumeScores:
    """DSC and NSD in 3D of every organ of every case, from masks that come slice by slice."""

    def __init__(
        self, datasets: Sequence[SliceDataset], slices: Sequence[Slice], shift: Shift
    ) -> None:
        """`shift`: of the expansion and shrink boxes. UserError for cases that are not whole."""
        whole = _by_case(sample for dataset in datasets for sample in dataset.split("all"))
        dropped = {(d.name, case): n for d in datasets for case, n in d.dropped_masks.items()}
        broken = []
        for case, samples in _by_case(slices).items():
            indices = [sample.index for sample in samples]
            if len(indices) != len(whole[case]):
                broken.append(f"{case[1]} (only some of its slices are evaluated)")
            elif len(indices) != max(indices) - min(indices) + 1:
                broken.append(f"{case[1]} (gaps between its slices)")
            elif dropped[case]:
                broken.append(f"{case[1]} (small masks were dropped)")
        if broken:
            raise UserError(
                f"--volume, --every: cannot be scored in 3D: {', '.join(broken)}; leave out the "
                "option, or these cases"
            )
        self._geometry = {(d.name, case): g for d in datasets for case, g in d.geometry.items()}
        self._shift = shift
        self._patients = {(s.dataset, s.case): s.patient for s in slices}
        self._tolerances: dict[str, float] = {}  # by label
        # By z, one bit per pixel: a case has models x boxes x labels x slices of them.
        self._targets: dict[tuple, dict[int, np.ndarray]] = defaultdict(dict)  # by organ
        self._masks: dict[tuple, dict[int, np.ndarray]] = defaultdict(dict)  # by model, box, organ

    def add(
        self, model: str, prompts: Sequence[Prompt], targets: Sequence[Target], masks: np.ndarray
    ) -> None:
        """Keep those of a slice's masks (P, K, H, W) whose prompts are scored in 3D: draw 0."""
        for prompt, of_prompt in zip(prompts, masks, strict=True):
            scored = prompt.shift in (TIGHT, self._shift) and prompt.box not in IN_2D
            for target, mask in zip(targets, of_prompt, strict=True):
                if scored and prompt.draw == 0:
                    dataset, _, case, z, label, _ = target.place
                    self.add_mask(model, prompt.box, (dataset, case, label), z, mask)
                    planes = self._targets[dataset, case, label]
                    planes[z] = planes.get(z, 0) | np.packbits(target.mask)  # all parts
                    self._tolerances[label] = target.tolerance

    def add_mask(
        self, model: str, box: str, organ: tuple[str, str, str], z: int, mask: np.ndarray
    ) -> None:
        """Keep a mask (H, W) bool of an organ (data set, case, label), or of a part of it."""
        planes = self._masks[model, box, organ]
        planes[z] = planes.get(z, 0) | np.packbits(mask)

    def finish(self) -> list[dict]:
        """The rows of volumes.csv of the cases that were added since the last call."""
        rows = []
        for (model, box, organ), planes in self._masks.items():
            dataset, case, label = organ
            geometry, targets = self._geometry[dataset, case], self._targets[organ]
            indices, shape = planes.keys() | targets.keys(), geometry.shape[1:]
            both = np.zeros((2, max(indices) - min(indices) + 1, *shape), bool)
            for volume, stack in zip(both, (planes, targets), strict=True):
                for z, bits in stack.items():
                    mask = np.unpackbits(bits, count=np.prod(shape)).reshape(shape)
                    volume[z - min(indices)] = mask
            (window,) = find_objects(both.any(axis=0).astype(np.uint8))
            prediction, target = both[0][window], both[1][window]
            patient = self._patients[dataset, case]
            row = {"model": model, "dataset": dataset, "patient": patient, "case": case}
            row |= {"label": label, "box": box, "voxels": int(target.sum())}
            row["dsc"] = dsc(prediction, target)
            row["nsd"] = nsd(prediction, target, self._tolerances[label], geometry.spacing_mm)
            rows.append(row)
        self._masks.clear()
        self._targets.clear()
        return rows


def follow(
    model: Predictor, track: Track, slices: Sequence[Slice]
) -> Iterator[tuple[int, np.ndarray]]:
    """z and mask (H, W) bool of every slice that one tight box of a target reaches by `propagate`.

    The box is that of the track's slice of the largest area. `slices` are the patient's: only those
    with a label are there, and a target is followed no farther.
    """
    of_case = {sample.index: sample for sample in slices if sample.case == track.slices[0].case}
    areas = [s.labels[instance] for s, instance in zip(track.slices, track.instances, strict=True)]
    largest = int(np.argmax(areas))
    start, depth = track.slices[largest].index, max(of_case) + 1
    decode = partial(_decode, model, of_case)
    mask = decode(start, [track.boxes[largest]])[0] > 0
    yield start, mask
    missing = set(range(depth)) - of_case.keys()
    for z, _, logits in propagate(start, mask, decode, depth, missing):
        yield z, logits > 0


def _decode(
    model: Predictor, slices: Mapping[int, Slice], z: int, boxes: Sequence[Box]
) -> np.ndarray:
    """Mask logits (K, H, W) of K boxes in native pixels of the slice of that z."""
    return model.predict(slices[z], slices[z].frame.boxes_to_frame(boxes)).cpu().numpy()


def _by_case(slices: Iterable[Slice]) -> dict[tuple[str, str], list[Slice]]:
    """The slices of each (data set, case)."""
    cases: dict[tuple[str, str], list[Slice]] = {}
    for sample in slices:
        cases.setdefault((sample.dataset, sample.case), []).append(sample)
    return cases


def save_predictions(
    models: Mapping[str, Predictor],
    slices: Sequence[Slice],
    datasets: Sequence[SliceDataset],
    folder: Path,
) -> None:
    """Write <folder>/<model>/<data set>/<case>.nii.gz: labels from tight boxes, on their grid."""
    geometry = {(d.name, case): g for d in datasets for case, g in d.geometry.items()}
    cases = _by_case(slices)
    for (dataset, case), samples in progress_bar(cases.items(), unit="case", desc="predicting"):
        grid = geometry[dataset, case]
        for name, model in models.items():
            volume = np.zeros(grid.shape, np.uint8)
            for sample in samples:
                _, instances, boxes = read_instances(sample)
                largest, winner = model.predict(sample, boxes).max(dim=0)
                labels = np.array([sample.label_of(instance) for instance in instances.tolist()])
                winner = labels[winner.cpu().numpy()]
                volume[sample.index] = np.where(largest.cpu().numpy() > 0, winner, 0)
            write_volume(folder / name / dataset / f"{case}.nii.gz", volume, grid)
