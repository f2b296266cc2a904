"""Weights that several files test."""

from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry

from utils.model.segmenter import Segmenter, load_model, save_decoder


@pytest.fixture(scope="session")
def vit_b(tmp_path_factory) -> Path:
    """A file of random ViT-B weights; those of MedSAM and SAM are no part of the repository."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit_b.pth"
    torch.save(sam_model_registry["vit_b"]().state_dict(), path)
    yield path
    path.unlink()  # 375 MB


@pytest.fixture
def fine_tune(tmp_path):
    """A function to a model with every tensor of its decoder changed, saved as decoder.pth."""

    def load(name: str, base: Path) -> Segmenter:
        model = load_model(name, base, "cpu")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.mask_decoder.parameters():
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
        save_decoder(tmp_path / "decoder.pth", model, {}, epoch=2)
        return model

    return load
