"""Per-slice masks stacked into volumes: scores in 3D, and label volumes to look at."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import find_objects

from perturb import BOX_KINDS, Shift
from utils.data.slices import Slice, SliceDataset, read_instances
from utils.data.volumes import write_volume
from utils.evaluation.models import Predictor
from utils.evaluation.prompts import Prompt
from utils.evaluation.scoring import Target, dsc, nsd
from utils.system import UserError
from utils.system.loops import progress_bar


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
                f"--volume: cannot be scored in 3D: {', '.join(broken)}; leave out --volume, or "
                "these cases"
            )
        self._geometry = {(d.name, case): g for d in datasets for case, g in d.geometry.items()}
        self._shift = shift
        self._planes: dict[tuple, dict[int, np.ndarray]] = defaultdict(dict)

    def add(
        self, model: str, prompts: Sequence[Prompt], targets: Sequence[Target], masks: np.ndarray
    ) -> None:
        """Keep those of a slice's masks (P, K, H, W) whose prompts are scored in 3D: draw 0."""
        for prompt, of_prompt in zip(prompts, masks, strict=True):
            shifted = prompt.box in BOX_KINDS[1:] and prompt.shift == self._shift
            if prompt.draw == 0 and (shifted or prompt.box == "standard"):
                for target, mask in zip(targets, of_prompt, strict=True):
                    dataset, patient, case, z, label, _ = target.place
                    organ = (model, dataset, patient, case, label, prompt.box, target.tolerance)
                    # One bit per pixel: a case has models x boxes x labels x slices of them.
                    bits = np.packbits([mask, target.mask])
                    self._planes[organ][z] = self._planes[organ].get(z, 0) | bits  # of all parts

    def finish(self) -> list[dict]:
        """The rows of volumes.csv of the cases that were added since the last call."""
        rows = []
        for (*names, tolerance), planes in self._planes.items():
            model, dataset, patient, case, label, box = names
            geometry = self._geometry[dataset, case]
            first, shape = min(planes), (2, *geometry.shape[1:])
            both = np.zeros((2, max(planes) - first + 1, *shape[1:]), bool)
            for z, bits in planes.items():
                both[:, z - first] = np.unpackbits(bits, count=np.prod(shape)).reshape(shape)
            (window,) = find_objects(both.any(axis=0).astype(np.uint8))
            prediction, target = both[0][window], both[1][window]
            row = {"model": model, "dataset": dataset, "patient": patient, "case": case}
            row |= {"label": label, "box": box, "voxels": int(target.sum())}
            row["dsc"] = dsc(prediction, target)
            row["nsd"] = nsd(prediction, target, tolerance, geometry.spacing_mm)
            rows.append(row)
        self._planes.clear()
        return rows


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
