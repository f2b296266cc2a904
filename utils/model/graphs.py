"""A training step's decoder call as a CUDA graph, which the GPU replays in a single launch.

Forward and backward of a few boxes are some 400 kernels, and launching them one by one takes longer
than running them. A graph has one shape, so there is one for each of SIZES, and boxes are padded to
it; the logits of the padding are cut off, so its gradients are zero. PyTorch's
`torch.cuda.make_graphed_callables` does the rest.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from utils.model.decoder import mask_logits
from utils.model.segmenter import Segmenter

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # boxes


class _Decoder(nn.Module):
    """`mask_logits` of one image; a module, since a graph's weights are its module's parameters."""

    def __init__(self, decoder: nn.Module, position: torch.Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("position", position, persistent=False)

    def forward(self, image: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return mask_logits(self.decoder, image, self.position, prompts, [len(prompts)])


class GraphedDecoder:
    """`Segmenter.decode_batch` for training: with a graph where there is one, else without."""

    def __init__(
        self,
        model: Segmenter,
        max_boxes: int,
        amp: torch.dtype | None,
        capture: Callable | None = None,
    ) -> None:
        """Capture a graph for each of SIZES up to `max_boxes` boxes, before other threads start.

        If that fails, as with an old driver, one line says so and no call uses a graph.
        `capture` is for machines without a GPU.
        """
        self._model = model
        self._weights = [w for w in model.mask_decoder.parameters() if w.requires_grad]
        self._graphs: dict[int, Callable] = {}
        if capture is None:
            # One pool of memory: the graphs take turns, and nothing but gradients outlives a turn.
            pool = torch.cuda.graph_pool_handle()
            capture = partial(torch.cuda.make_graphed_callables, pool=pool)
        last = min((size for size in SIZES if size >= max_boxes), default=SIZES[-1])
        embedding = torch.zeros(1, *model.embedding_shape, device=model.device)
        # Casts that autocast keeps would not be part of the graph.
        autocast = torch.autocast(model.device.type, amp, amp is not None, cache_enabled=False)
        try:
            for size in reversed(SIZES[: SIZES.index(last) + 1]):  # the largest makes the room
                inputs = model.prompt(embedding, [np.zeros((size, 4), np.float32)])
                with autocast:
                    graph = capture(_Decoder(model.mask_decoder, model.position), inputs)
                self._graphs[size] = graph
        except RuntimeError as error:
            print(f"--cuda-graphs: continuing without, since capturing failed: {error}")
            self._graphs.clear()

    def __call__(self, embeddings: torch.Tensor, boxes: Sequence[np.ndarray]) -> torch.Tensor:
        """Arguments and result of `Segmenter.decode_batch`."""
        count = len(boxes[0])
        size = min((size for size in self._graphs if size >= count), default=None)
        # A graph writes gradients where its last call did, so it cannot add to those of a step.
        adds = any(weight.grad is not None for weight in self._weights)
        if len(boxes) > 1 or size is None or adds:
            return self._model.decode_batch(embeddings, boxes)
        padding = np.repeat(boxes[0][-1:], size - count, axis=0)
        prompted = self._model.prompt(embeddings, [np.concatenate([boxes[0], padding])])
        return self._graphs[size](*prompted)[:count]
