"""Models with known answers and made-up scores, for the tests of the evaluation."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import eval as evaluation
from perturb import BOX_KINDS, LIKE, LOOSE, Shift
from tests.helpers import preprocess, write_volume
from utils.data.slices import Slice, SliceDataset, open_dataset, read_label_map
from utils.evaluation.models import Predictor
from utils.evaluation.prompts import Protocol, ReportContext
from utils.evaluation.scoring import Row, tolerances_of
from utils.evaluation.statistics import to_frame

SHIFTS = (Shift(0.15, "side"), Shift(20, "px"))
RIGHT_EDGES = {1: 51, 2: 60, 3: 54, 4: 57, 5: 70, 6: 58, 7: 63}  # of `stack`'s bar, by z
MODELS = {"untouched": 0.0, "medsam": 0.05, "adaptive": 0.10}  # and what each adds to a score
# What a box costs; `adaptive` loses a quarter of it.
LOSS = {"standard": 0.0, "expansion": 0.05, "shrink": 0.2, "loose": 0.1}
LOSS |= {"like every 5": 0.07, "like every 10": 0.15}


def protocol(**changes) -> Protocol:
    sweep = (Shift(-0.2, "side"), Shift(0.2, "side"))
    return Protocol(**({"shifts": SHIFTS, "sweep": sweep} | changes))


def context(**changes) -> ReportContext:
    options = {
        "protocol": protocol(),
        "baseline": "medsam",
        "proposed": "adaptive",
        "data": "made-up (split test)",
        "tolerance": "2 mm",
    }
    return ReportContext(**(options | changes))


def where(scores: pd.DataFrame, **values) -> pd.DataFrame:
    for column, value in values.items():
        scores = scores[scores[column] == value]
    return scores


def mean(scores: pd.DataFrame, score: str, **values) -> float:
    return float(where(scores, **values)[score].mean())


def made_up(patients: int, draws: int = 1) -> pd.DataFrame:
    """Scores that are easy to average: a large and a small instance in each patient."""
    rng = np.random.default_rng(0)
    rows = []
    families = (*product(BOX_KINDS[1:], ("15%", "20px")), (LOOSE, "15%"), *product(LIKE, ["0%"]))
    prompts = [("standard", "0%", 0), ("sweep", "-20%", 0), ("sweep", "20%", 0)]
    prompts += [(*family, draw) for family in families for draw in range(draws)]
    for number in range(patients):
        for label, small in (("liver", False), ("adrenal gland", True)):
            level = 0.6 + 0.2 * rng.random()
            for model, gain in MODELS.items():
                noise = 0.01 * rng.random()
                for box, shift, draw in prompts:
                    loss = LOSS[{"-20%": "shrink", "20%": "expansion"}.get(shift, box)]
                    score = level + gain + noise + 0.02 * draw
                    score -= loss / 4 if model == "adaptive" else loss
                    place = (model, "made-up", f"p{number}", f"p{number}", 7, label, 1)
                    size, scored = (90, small), (score, score / 2, 0.0, float(score < 0.6))
                    rows.append(Row(*place, box, shift, draw, *size, *scored))
    return to_frame(rows)


class KnownAnswer:
    """A model whose embedding is the label map and whose masks are what `answer` makes of it."""

    device = torch.device("cpu")

    def __init__(self, answer) -> None:
        self.answer, self.boxes = answer, []

    def decode(self, embedding, boxes):
        self.boxes.append(boxes)
        labels = [label for label in embedding.unique() if label]
        masks = torch.stack([self.answer(embedding == label) for label in labels])
        times = -(-len(boxes) // len(labels))  # the boxes of an example are fewer than labels
        return (masks.float() - 0.5).repeat(times, 1, 1)[: len(boxes)]


def label_map_of(sample: Slice) -> torch.Tensor:
    return torch.from_numpy(read_label_map(sample.label_path))


def known(**answers) -> dict[str, Predictor]:
    return {
        name: Predictor(KnownAnswer(answer), label_map_of, weights_sha256=name)
        for name, answer in answers.items()
    }


def evaluate(slices, tolerance=2.0, workers=0, **answers) -> tuple[pd.DataFrame, dict]:
    """eval.py's scores of models that answer so, and the models."""
    models = known(**answers)
    sweep = tuple(map(Shift.parse, ("-25%", "25%", "-20px", "20px")))
    patients = evaluation.evaluate(
        models, slices, protocol(sweep=sweep, draws=2), tolerances_of(tolerance, slices), workers
    )
    rows = [row for _, scores in patients for row in scores.rows]
    return to_frame(rows), {name: model.segmenter for name, model in models.items()}


def stack(folder: Path, cases: int = 1, *more: str) -> SliceDataset:
    """Cases of nine slices: a spot of two pieces in z 1 to 4 and 6 to 7, and a bar in z 1 to 7.

    The bar goes from x 40 to RIGHT_EDGES and from y 10 to 29, the spot from 10 + z to 19 + z and
    from y 40 to 49, in 64 x 80 pixels. With `--parts spot` it has a second part in z 2 to 4, and
    in z 4 a third one far off in place of the first.
    """
    labels = np.zeros((9, 64, 80), np.uint8)
    for z, edge in RIGHT_EDGES.items():
        labels[z, 10:30, 40 : edge + 1] = 2
        if z != 5:
            labels[z, 40:50, 10 + z : 20 + z] = 1
    if more:
        labels[2:5, 54:60, 30:36] = 1
        labels[4, 40:50, :30], labels[4, 40:50, 70:] = 0, 1
    rng = np.random.default_rng(0)
    for number in range(cases):
        hu = (labels * 150.0 - 300 + rng.normal(0, 8, labels.shape)).astype(np.int16)
        write_volume(folder / f"ct/images/s{number}_0000.nii.gz", hu)
        write_volume(folder / f"ct/labels/s{number}.nii.gz", labels)
    names = ("--label-names", "1=spot,2=bar", "--split", "0,0,1", "--window", "medsam")
    preprocess(folder / "ct", folder / "stack", *names, *more)
    return open_dataset(folder / "stack")


class InBox(KnownAnswer):
    """A model whose masks are whatever has a label within the box."""

    def __init__(self) -> None:
        super().__init__(None)

    def decode(self, embedding, boxes):
        self.boxes.append(boxes)
        y, x = torch.meshgrid(*map(torch.arange, embedding.shape), indexing="ij")
        inside = [(x >= x0) & (x <= x1) & (y >= y0) & (y <= y1) for x0, y0, x1, y1 in boxes]
        return (torch.stack(inside) & (embedding > 0)).float() - 0.5


def in_box() -> dict[str, Predictor]:
    return {"in box": Predictor(InBox(), label_map_of, weights_sha256="in box")}
