"""Names of labels, as options and other programs' files give them."""

import json

import nibabel
import numpy as np
import pytest

from tests.helpers import write_volume
from utils.data.labels import parse_label_names
from utils.system import UserError

NAMES = {1: "liver", 12: "left kidney"}
ITK_SNAP = """\
################################################
# ITK-SnAP Label Description File
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
    0     0    0    0        0  0  0    "Clear Label"
    1   255    0    0        1  1  1    "liver"
   12     0  255    0     0.55  1  0    "left kidney"
"""
FILES = {
    "itk_snap.txt": ITK_SNAP,
    "nnunet2.json": json.dumps({"labels": {"background": 0, "liver": 1, "left kidney": 12}}),
    "nnunet1.json": json.dumps({"labels": {"0": "background", "1": "liver", "12": "left kidney"}}),
    "predictions.json": json.dumps({"label_names": {"1": "liver", "12": "left kidney"}}),
}


@pytest.mark.parametrize("text", ["1=liver,12=left kidney", "1 = liver; 12=left kidney"])
def test_names_in_an_option(text):
    assert parse_label_names(text) == NAMES


@pytest.mark.parametrize("name", FILES)
def test_names_in_files_of_text(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert parse_label_names(str(tmp_path / name)) == NAMES


def test_names_in_the_header_of_a_label_map(tmp_path):
    """As TotalSegmentator writes them."""
    write_volume(tmp_path / "a.nii.gz", np.ones((3, 4, 5), np.uint8))
    rows = (f'<Label Key="{n}" Red="1.0"><![CDATA[{name}]]></Label>' for n, name in NAMES.items())
    image = nibabel.load(tmp_path / "a.nii.gz")
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, "\n".join(rows).encode()))
    for name in ("b.nii.gz", "b.nii"):
        nibabel.save(image, tmp_path / name)
        assert parse_label_names(str(tmp_path / name)) == NAMES
    with pytest.raises(UserError, match="a.nii.gz: no label names in a known format"):
        parse_label_names(str(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1=liver,tumour", "expected ID=NAME with ID 1-255, got 'tumour='"),
        ("labels.txt", "expected ID=NAME with ID 1-255, got 'labels.txt='"),
        *((f"{label}=a", "expected ID=NAME") for label in ("0", "256", "\N{SUPERSCRIPT TWO}", "x")),
        ("1=a,1=b", "occurs twice: '1=b'"),
        ("1=a;2=a", "occurs twice: '2=a'"),
    ],
)
def test_names_that_cannot_be(text, expected):
    with pytest.raises(UserError, match=expected):
        parse_label_names(text)
