"""What a training step is made of."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from perturb import Perturbation
from utils.data.slices import open_dataset, read_label_map
from utils.model.embeddings import Embeddings
from utils.model.segmenter import load_model
from utils.training.batches import Batch, TargetStore, chunks, coverage, load_batch, training_boxes
from utils.training.losses import segmentation_loss


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
def test_chunks_hold_every_box_once_and_in_order(boxes_per_call):
    batch, boxes = numbered_batch(3, 1, 4)
    found = list(chunks(batch, boxes, NumberedEmbeddings(), boxes_per_call))
    sizes = [sum(map(len, chunk.boxes)) for chunk in found]
    assert sum(sizes) == 8 and set(sizes[:-1]) <= {boxes_per_call} and sizes[-1] > 0
    numbers = np.concatenate([each[:, 0] for chunk in found for each in chunk.boxes])
    assert numbers.tolist() == list(range(8))
    slice_of_box = [0, 0, 0, 1, 2, 2, 2, 2]
    for chunk in found:
        numbers = np.concatenate([each[:, 0] for each in chunk.boxes])
        assert (chunk.targets[:, 0, 0] * 16).tolist() == numbers.tolist()
        slices = np.repeat(chunk.embeddings.tolist(), [len(each) for each in chunk.boxes])
        assert slices.tolist() == [slice_of_box[int(number)] for number in numbers]


def test_targets_repeat_with_the_boxes_of_a_slice():
    batch, boxes = numbered_batch(2, 1)
    thrice = [np.concatenate([each] * 3) for each in boxes]
    (chunk,) = chunks(batch, thrice, NumberedEmbeddings(), 100)
    assert (chunk.targets[:, 0, 0] * 16).tolist() == [0, 1, 0, 1, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("resolution", [256, 1024])
def test_targets_are_the_covered_share_of_each_pixel(toy_slices, resolution):
    sample = open_dataset(toy_slices).split("train")[0]
    store = TargetStore(resolution)
    boxes, areas, counts = store.get(sample)
    assert all(map(np.array_equal, store.get(sample), (boxes, areas, counts)))  # the second time
    targets = coverage(torch.from_numpy(counts))
    label_map = read_label_map(sample.label_path)
    assert targets.shape == (2, resolution, resolution) and targets.dtype == torch.float32
    side = 1024 // resolution
    for label, box, target in zip((1, 2), boxes, targets, strict=True):
        blocks = (label_map == label).reshape(resolution, side, resolution, side)
        assert np.array_equal(target.numpy(), blocks.mean(axis=(1, 3), dtype=np.float32))
        x0, y0, x1, y1 = (box // side).astype(int)
        assert not target[:y0].any() and not target[:, x1 + 1 :].any()
    assert targets.max() == 1
    assert areas.tolist() == [(label_map == label).sum() for label in (1, 2)]


def test_boxes_of_a_label_do_not_depend_on_other_labels(toy_slices):
    sample = open_dataset(toy_slices).split("train")[0]
    tight, areas, _ = TargetStore(256).get(sample)
    adaptive = Perturbation("adaptive")
    both, again, other_seed, other_epoch = (
        training_boxes(sample, tight, areas, adaptive, seed, epoch)
        for seed, epoch in ((3, 1), (3, 1), (4, 1), (3, 2))
    )
    assert (both == again).all() and (both != other_seed).any() and (both != other_epoch).any()
    alone = replace(sample, labels={2: sample.labels[2]})
    assert (training_boxes(alone, tight[1:], areas[1:], adaptive, 3, 1) == both[1:]).all()


def test_gradient_is_of_the_mean_over_all_boxes_of_a_step(dataset):
    """However many boxes are in a call, and whether the slices are in one step or summed."""
    model, samples = load_model("lite_medsam", None, "cpu"), dataset.split("train")[:3]
    embeddings = Embeddings(model, samples)
    batch = load_batch(samples, embeddings, TargetStore(256))
    fields = ("samples", "tight_boxes", "targets", "loaded")
    singles = [
        replace(batch, **{name: [getattr(batch, name)[n]] for name in fields}) for n in range(3)
    ]
    gradients = []
    for batches, boxes_per_call in (([batch], 16), ([batch], 1), ([batch], 4), (singles, 16)):
        model.mask_decoder.zero_grad(set_to_none=True)
        for each in batches:
            for chunk in chunks(each, each.tight_boxes, embeddings, boxes_per_call):
                logits = model.decode_batch(chunk.embeddings, chunk.boxes)
                (segmentation_loss(logits, chunk.targets).sum() / 6).backward()
        parts = [p.grad.flatten() for p in model.mask_decoder.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    whole, *others = gradients
    assert all((found - whole).norm() <= 1e-3 * whole.norm() for found in others)
