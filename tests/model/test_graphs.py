"""The decoder call that is captured for a few numbers of boxes, without a GPU to capture it."""

import numpy as np
import pytest
import torch

from utils.model.graphs import SIZES, GraphedDecoder


class Captured:
    """Stands for CUDA graphs: takes the shapes it was captured for and no other."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, module, inputs):
        shapes = [tensor.shape for tensor in inputs]

        def replay(*tensors):
            assert [tensor.shape for tensor in tensors] == shapes
            self.calls.append(len(tensors[1]))
            return module(*tensors)

        return replay


@pytest.fixture
def captured():
    return Captured()


def inputs_of(model, count, slices=1):
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 500, (slices, count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + 1 + rng.uniform(9, 400, corners.shape)], axis=2)
    torch.manual_seed(count)
    return torch.randn(slices, *model.embedding_shape), list(boxes.astype(np.float32))


def gradients(model, decode, inputs):
    model.mask_decoder.zero_grad(set_to_none=True)
    logits = decode(*inputs)
    logits.sigmoid().square().mean(dim=(1, 2)).sum().backward()
    weights = [w for w in model.mask_decoder.parameters() if w.requires_grad]
    return logits.detach(), torch.cat([weight.grad.flatten() for weight in weights])


@pytest.mark.parametrize("count", [1, 5])
def test_padded_boxes_change_neither_logits_nor_gradients(lite_medsam, captured, count):
    graphed = GraphedDecoder(lite_medsam, 16, None, captured)
    inputs = inputs_of(lite_medsam, count)
    logits, gradient = gradients(lite_medsam, graphed, inputs)
    expected = gradients(lite_medsam, lite_medsam.decode_batch, inputs)
    assert captured.calls == [min(size for size in SIZES if size >= count)]
    assert torch.allclose(logits, expected[0], atol=1e-3)
    assert (gradient - expected[1]).norm() < 1e-4 * expected[1].norm()


def test_what_no_graph_can_do_is_done_without(lite_medsam, captured):
    graphed = GraphedDecoder(lite_medsam, 3, None, captured)
    gradients(lite_medsam, graphed, inputs_of(lite_medsam, 2))
    assert captured.calls == [2]
    graphed(*inputs_of(lite_medsam, 2))  # would overwrite the gradients of the call before
    lite_medsam.mask_decoder.zero_grad(set_to_none=True)
    graphed(*inputs_of(lite_medsam, 4))  # more boxes than any graph has
    graphed(*inputs_of(lite_medsam, 1, slices=2))
    assert captured.calls == [2]
    graphed(*inputs_of(lite_medsam, 1))
    assert captured.calls == [2, 1]


def test_a_gpu_that_cannot_capture_trains_without(lite_medsam, capsys):
    def fails(*_):
        raise RuntimeError("operation not permitted")

    graphed = GraphedDecoder(lite_medsam, 3, None, fails)
    assert "continuing without, since capturing failed: operation not" in capsys.readouterr().out
    inputs = inputs_of(lite_medsam, 2)
    assert torch.equal(graphed(*inputs), lite_medsam.decode_batch(*inputs))
