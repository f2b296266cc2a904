"""The decoder's own evaluation against segment-anything's."""

import pytest
import torch
from segment_anything.modeling import MaskDecoder, TwoWayTransformer

from utils.model.decoder import freeze_unused, mask_logits

SIDE = 12  # of the embedding; the networks' own is 64


@pytest.fixture
def decoder():
    """SAM's decoder with random weights; biases and norms random as well."""
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    found = MaskDecoder(transformer_dim=256, transformer=transformer)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def made_up(count: int, tokens: int = 2):
    """Image embeddings (2, ...), position, and `count` prompts."""
    torch.manual_seed(1)
    images = torch.randn(2, 256, SIDE, SIDE + 3)
    return images, torch.randn(1, 256, SIDE, SIDE + 3), torch.randn(count, tokens, 256)


def theirs(decoder, images, position, prompts, counts):
    found = []
    for image, part in zip(images, prompts.split(counts), strict=True):
        masks, _ = decoder(
            image_embeddings=image[None],
            image_pe=position,
            sparse_prompt_embeddings=part,
            dense_prompt_embeddings=torch.zeros(len(part), *image.shape),
            multimask_output=False,
        )
        found.append(masks[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("counts", [[1, 1], [3, 2], [1, 6]])
@pytest.mark.parametrize("tokens", [2, 3])
def test_masks_are_segment_anythings(decoder, counts, tokens):
    inputs = (*made_up(sum(counts), tokens), counts)
    with torch.no_grad():
        found, expected = mask_logits(decoder, *inputs), theirs(decoder, *inputs)
    assert found.shape == (sum(counts), 4 * SIDE, 4 * (SIDE + 3))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_gradients_are_segment_anythings(decoder):
    inputs = (*made_up(3), [2, 1])
    gradients = []
    for function in (theirs, mask_logits):
        decoder.zero_grad()
        function(decoder, *inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters()})
    freeze_unused(decoder)
    trained = [name for name, p in decoder.named_parameters() if p.requires_grad]
    for name in trained:
        expected, found = (each[name] for each in gradients)
        assert (found - expected).norm() <= 1e-3 * expected.norm(), name
    norms = {name: g.norm() for name, g in gradients[0].items() if g is not None}
    for name in norms.keys() - trained:  # nothing to learn there, in theirs neither
        assert norms[name] < 1e-5 * max(norms.values()), name


def test_mixed_precision_is_as_close_as_theirs(decoder):
    inputs = (*made_up(3), [1, 2])
    with torch.no_grad():
        exact = theirs(decoder, *inputs)
        with torch.autocast("cpu", torch.bfloat16):
            errors = [
                ((function(decoder, *inputs) - exact).norm() / exact.norm()).item()
                for function in (mask_logits, theirs)
            ]
    assert errors[0] < max(0.02, 1.5 * errors[1])
