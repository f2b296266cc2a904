"""The boxes of an evaluation: by kind, and the same for every model in any order."""

import numpy as np
import pytest
import torch

import eval as evaluation
from perturb import Shift
from tests.evaluation.helpers import evaluate, protocol
from utils.data.slices import open_dataset, read_instances
from utils.evaluation.inputs import tolerances_of
from utils.evaluation.prompts import Prompt, all_prompts, boxes_of

OUTWARD = np.array([-1, -1, 1, 1])


@pytest.fixture
def slices(toy_slices):
    return open_dataset(toy_slices).split("all")


def boxes(entry, kind: str, shift: str, draw: int = 0, seed: int = 0) -> np.ndarray:
    _, labels, tight = read_instances(entry)
    return boxes_of(entry, labels, tight, Prompt(kind, Shift.parse(shift), draw), seed)


def sides_of(tight: np.ndarray) -> np.ndarray:
    return np.tile(tight[:, 2:] - tight[:, :2] + 1, 2)


def test_boxes_are_the_same_for_every_model_and_in_any_order(slices):
    _, models = evaluate(slices, a=lambda target: target, b=torch.zeros_like)
    _, reverse = evaluate(slices[::-1], a=lambda target: target)
    calls = len(models["a"].boxes) // len(slices)  # decoder calls per slice
    backwards = [
        box
        for start in range(len(reverse["a"].boxes) - calls, -1, -calls)
        for box in reverse["a"].boxes[start : start + calls]
    ]
    for first, other, again in zip(models["a"].boxes, models["b"].boxes, backwards, strict=True):
        assert (first == other).all() and (first == again).all()


def test_boxes_by_kind(slices):
    entry = slices[0]
    tight = boxes(entry, "standard", "0%")
    assert (tight == read_instances(entry)[2]).all()
    sides = sides_of(tight)
    expanded = (boxes(entry, "expansion", "15%") - tight) * OUTWARD
    shrunk = (boxes(entry, "shrink", "15%") - tight) * OUTWARD
    assert (expanded > 0).all() and (expanded <= 0.15 * sides).all()
    assert shrunk == pytest.approx(-expanded, abs=1e-3)
    half = (boxes(entry, "expansion", "7.5%") - tight) * OUTWARD
    assert half == pytest.approx(expanded / 2, abs=1e-3)
    pixels = (boxes(entry, "expansion", "20px") - tight) * OUTWARD
    assert pixels == pytest.approx(expanded / sides / 0.15 * 20, abs=1e-2)
    loose = (boxes(entry, "loose", "15%") - tight) * OUTWARD
    assert (loose < 0).any() and (loose > 0).any() and (abs(loose) <= 0.15 * sides).all()
    swept = (boxes(entry, "sweep", "-10%") - tight) * OUTWARD
    assert swept == pytest.approx(-0.1 * sides, abs=1e-3)


def test_every_instance_and_draw_has_boxes_of_its_own(slices):
    shares = []
    for entry in slices[:4]:
        tight = boxes(entry, "standard", "0%")
        for draw in (0, 1):
            shares.append((boxes(entry, "expansion", "15%", draw) - tight) / sides_of(tight))
    drawn = np.abs(np.concatenate(shares)).ravel()
    assert len(np.unique(drawn.round(5))) == len(drawn)
    first, second = (boxes(slices[0], "shrink", "15%", seed=seed) for seed in (0, 1))
    assert (first != second).all()


def test_decoder_calls_are_small_and_each_prompt_gets_its_own_masks(slices):
    """A model that fills the columns of its box: each row's area tells which box it is of."""

    class Box:
        device = torch.device("cpu")

        def decode(self, embedding, boxes):
            calls.append(len(boxes))
            x = torch.arange(1024)
            inside = (x >= torch.tensor(boxes[:, :1])) & (x <= torch.tensor(boxes[:, 2:3]))
            return inside[:, None].float().expand(-1, 1024, -1) - 0.5

    class Recorder:
        def add_masks(self, model, prompts, labels, masks, index):
            recorded.extend(zip(prompts, masks, strict=True))

        def finish_slice(self, entry, native):
            pass

        def finish(self):
            return []

    calls: list[int] = []
    recorded: list = []
    entry = slices[0]
    _, labels, tight = read_instances(entry)
    sweep = tuple(Shift.parse(f"{share}%") for share in range(-20, 21) if share)
    many = protocol(sweep=sweep)
    tolerances = tolerances_of(2.0, slices)
    embeddings = {"box": lambda entry: None}
    evaluation.evaluate({"box": Box()}, embeddings, [entry], tolerances, many, Recorder())
    prompts = all_prompts(many)
    assert max(calls) <= evaluation.DECODE_BOXES and sum(calls) == 2 * len(prompts)
    assert [prompt for prompt, _ in recorded] == prompts
    width = entry.frame.native[1] / entry.frame.content[1]
    for prompt, masks in recorded:
        of_prompt = boxes_of(entry, labels, tight, prompt, many.seed)
        expected = (of_prompt[:, 2] - of_prompt[:, 0] + 1) * width
        assert masks.shape == (2, *entry.frame.native)
        assert masks[:, 0].sum(axis=1) == pytest.approx(expected, abs=1.5)
