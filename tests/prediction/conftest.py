"""A scan that several files segment."""

from pathlib import Path

import pytest

from tests.helpers import BOXES_HEADER, tight_rows, toy_case, write_volume


@pytest.fixture
def scan(tmp_path) -> Path:
    """A toy scan, with its tight boxes in boxes.csv beside it."""
    write_volume(tmp_path / "toy_0_0000.nii.gz", toy_case(0)[0])
    (tmp_path / "boxes.csv").write_text(BOXES_HEADER + tight_rows(0))
    return tmp_path / "toy_0_0000.nii.gz"
