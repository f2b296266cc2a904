"""What steps are made of, and reading ahead."""

import threading

import numpy as np
import pytest
import torch

from utils.data.slices import open_dataset
from utils.system.prefetch import prefetch
from utils.training.batches import Batch, load_batch


def batch_of(*counts: int) -> Batch:
    """Slices named a, b, ... with so many boxes, numbered throughout."""
    ends = np.cumsum(counts)
    numbers = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    return Batch(
        entries=list("abcdef"[: len(counts)]),
        loaded=[torch.tensor(n) for n in range(len(counts))],
        boxes=[np.repeat(each[:, None], 4, axis=1) for each in numbers],
        targets=[torch.from_numpy(each)[:, None, None] for each in numbers],
    )


@pytest.mark.parametrize("most", [1, 2, 3, 4, 100])
def test_parts_hold_every_box_once_in_order(most):
    batch = batch_of(3, 1, 4)
    parts = batch.parts(most)
    sizes = [sum(map(len, part.boxes)) for part in parts]
    assert sum(sizes) == 8 and all(size == most for size in sizes[:-1]) and 0 < sizes[-1] <= most
    boxes = np.concatenate([boxes for part in parts for boxes in part.boxes])
    assert boxes[:, 0].tolist() == list(range(8))
    for part in parts:
        for entry, loaded, of_slice, targets in zip(
            part.entries, part.loaded, part.boxes, part.targets, strict=True
        ):
            assert entry == "abc"[loaded]
            assert targets.flatten().tolist() == of_slice[:, 0].tolist()


def test_targets_repeat_with_the_boxes_of_a_slice(toy_slices):
    class Nothing:
        load = staticmethod(lambda entry: None)

    entries = open_dataset(toy_slices).split("train")[:2]
    batch = load_batch(entries, Nothing, 256, lambda entry, tight: np.concatenate([tight] * 3))
    for boxes, targets in zip(batch.boxes, batch.targets, strict=True):
        assert len(boxes) == len(targets) == 6
        assert torch.equal(targets[:2], targets[2:4]) and torch.equal(targets[:2], targets[4:])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_is_map(depth):
    threads = set()

    def square(x):
        threads.add(threading.get_ident())
        return x * x

    assert list(prefetch(square, range(7), depth)) == [x * x for x in range(7)]
    assert (threads == {threading.get_ident()}) == (depth == 0)


@pytest.mark.parametrize("depth", [0, 2])
def test_prefetch_raises_where_the_item_was_due(depth):
    def fail_at_three(x):
        if x == 3:
            raise OSError("three")
        return x

    seen = []
    with pytest.raises(OSError, match="three"):
        for x in prefetch(fail_at_three, range(6), depth):
            seen.append(x)
    assert seen == [0, 1, 2]
