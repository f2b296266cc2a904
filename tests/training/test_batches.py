"""What a training step is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from utils.data.slices import open_dataset, read_instances, read_label_map
from utils.model.embeddings import Embeddings
from utils.training.batches import (
    Batch,
    TargetStore,
    accumulate,
    coverage,
    decoder_parts,
    load_batch,
    load_step,
)


class NumberedEmbeddings:
    """The embedding of a slice is its number in the batch."""

    def embed(self, loaded, slices):
        return torch.stack(list(loaded))


def numbered_batch(*counts: int) -> tuple[Batch, list[np.ndarray]]:
    """Slices with so many boxes each; boxes and targets are numbered throughout."""
    ends = np.cumsum(counts)
    numbers = [np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]
    boxes = [np.repeat(each[:, None], 4, axis=1).astype(np.float32) for each in numbers]
    targets = [torch.from_numpy(each)[:, None, None].expand(-1, 256, 256) for each in numbers]
    loaded = [torch.tensor(float(n)) for n in range(len(counts))]
    areas = [np.ones(count, np.int64) for count in counts]
    return Batch(list("abcdef"[: len(counts)]), boxes, areas, targets, loaded), boxes


@pytest.mark.parametrize("boxes_per_call", [1, 2, 3, 4, 100])
def test_parts_hold_every_box_once_and_in_order(boxes_per_call):
    batch, boxes = numbered_batch(3, 1, 4)
    parts = list(decoder_parts(batch, boxes, NumberedEmbeddings(), boxes_per_call))
    sizes = [sum(map(len, part.boxes)) for part in parts]
    assert sum(sizes) == 8 and set(sizes[:-1]) <= {boxes_per_call} and sizes[-1] > 0
    numbers = np.concatenate([each[:, 0] for part in parts for each in part.boxes])
    assert numbers.tolist() == list(range(8))
    slice_of_box = [0, 0, 0, 1, 2, 2, 2, 2]
    for part in parts:
        numbers = np.concatenate([each[:, 0] for each in part.boxes])
        assert (part.targets[:, 0, 0] * 16).tolist() == numbers.tolist()
        slices = np.repeat(part.embeddings.tolist(), [len(each) for each in part.boxes])
        assert slices.tolist() == [slice_of_box[int(number)] for number in numbers]


def test_targets_repeat_with_the_boxes_of_a_slice():
    batch, boxes = numbered_batch(2, 1)
    thrice = [np.concatenate([each] * 3) for each in boxes]
    (part,) = decoder_parts(batch, thrice, NumberedEmbeddings(), 100)
    assert (part.targets[:, 0, 0] * 16).tolist() == [0, 1, 0, 1, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("resolution", [256, 1024])
def test_targets_are_the_covered_share_of_each_pixel(toy_slices, resolution):
    entry = open_dataset(toy_slices).split("train")[0]
    boxes, areas, counts = TargetStore(resolution).get(entry)
    targets = coverage(torch.from_numpy(counts))
    label_map = read_label_map(entry.label_path)
    assert targets.shape == (2, resolution, resolution) and targets.dtype == torch.float32
    side = 1024 // resolution
    for label, box, target in zip((1, 2), boxes, targets, strict=True):
        blocks = (label_map == label).reshape(resolution, side, resolution, side)
        assert np.array_equal(target.numpy(), blocks.mean(axis=(1, 3), dtype=np.float32))
        x0, y0, x1, y1 = (box // side).astype(int)
        assert not target[:y0].any() and not target[:, x1 + 1 :].any()
    assert targets.max() == 1
    assert areas.tolist() == [(label_map == label).sum() for label in (1, 2)]


@pytest.mark.parametrize("room", [0, 2**30])
def test_targets_are_read_once_while_there_is_room(toy_slices, monkeypatch, room):
    """And are the same bits every time."""
    reads = []

    def counted(entry):
        reads.append(entry.name)
        return read_instances(entry)

    monkeypatch.setattr("utils.training.batches.read_instances", counted)
    monkeypatch.setattr("utils.training.batches.TARGET_BYTES", room)
    entries = open_dataset(toy_slices).split("train")
    store = TargetStore(256)
    first, second = ([store.get(entry) for entry in entries] for _ in range(2))
    assert len(reads) == len(entries) * (1 if room else 2)
    for one, again in zip(first, second, strict=True):
        assert all(map(np.array_equal, one, again))  # boxes, areas, targets
        assert one[2].base is None and not np.shares_memory(one[2], again[2])


@pytest.mark.parametrize(("rank", "slices", "weight"), [(0, 2, 2 / 6), (1, 1, 2 / 6)])
def test_every_process_loads_its_share_of_a_step(toy_slices, monkeypatch, rank, slices, weight):
    class Nothing:
        load = staticmethod(lambda entry: None)

    monkeypatch.setattr("utils.system.distributed.world_size", lambda: 2)
    monkeypatch.setattr("utils.system.distributed.rank", lambda: rank)
    step = open_dataset(toy_slices).split("train")[:3]
    batch = load_step(step, Nothing, TargetStore(256))
    assert len(batch.slices) == slices and batch.boxes_in_step == 6
    assert batch.loss_weight == pytest.approx(weight)
    idle = load_step(
        step[:1], Nothing, TargetStore(256)
    )  # rank 1 has no slice and takes part all the same
    assert len(idle.slices) == 1 and idle.loss_weight == (0 if rank else 1)


def test_gradients_are_exchanged_after_the_last_part_alone():
    class Parallel:
        alone = 0

        def no_sync(self):
            class Context:
                __enter__ = lambda _: setattr(self, "alone", self.alone + 1)  # noqa: E731
                __exit__ = lambda *_: setattr(self, "alone", self.alone - 1)  # noqa: E731

            return Context()

    decode = Parallel()
    assert [(part, decode.alone) for part in accumulate("abc", decode)] == [
        ("a", 1),
        ("b", 1),
        ("c", 0),
    ]
    assert list(accumulate("a", nn.Identity())) == ["a"]  # one process


@pytest.fixture(scope="module")
def gradients(toy_slices):
    """A function to the decoder's gradient of the mean loss over the boxes of three slices."""
    from utils.model.segmenter import load_model
    from utils.training.losses import segmentation_loss

    model = load_model("lite_medsam", None, "cpu")
    dataset = open_dataset(toy_slices)
    entries = dataset.split("train")[:3]
    embeddings = Embeddings(model, entries)
    batch = load_batch(entries, embeddings, TargetStore(256))

    def of(batches: list[Batch], boxes_per_call: int) -> torch.Tensor:
        model.mask_decoder.zero_grad(set_to_none=True)
        for each in batches:
            for part in decoder_parts(each, each.tight_boxes, embeddings, boxes_per_call):
                logits = model.decode_batch(part.embeddings, part.boxes)
                (segmentation_loss(logits, part.targets).sum() / 6).backward()
        parameters = model.mask_decoder.parameters()
        return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    return of, batch


@pytest.mark.parametrize("boxes_per_call", [1, 4])
def test_boxes_per_call_do_not_change_the_gradient(gradients, boxes_per_call):
    gradient_of, batch = gradients
    whole, in_parts = gradient_of([batch], 16), gradient_of([batch], boxes_per_call)
    assert (in_parts - whole).norm() <= 1e-3 * whole.norm()


def test_several_slices_in_a_step_are_the_mean_over_their_boxes(gradients):
    gradient_of, batch = gradients
    fields = ("slices", "tight_boxes", "targets", "loaded")
    singles = [
        replace(batch, **{name: [getattr(batch, name)[n]] for name in fields}) for n in range(3)
    ]
    together, apart = gradient_of([batch], 16), gradient_of(singles, 16)
    assert (together - apart).norm() <= 1e-3 * apart.norm()
