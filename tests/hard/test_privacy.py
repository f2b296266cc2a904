"""Names and dates in a CT file's header reach no output, log or report."""

import gzip
import struct
from pathlib import Path

import eval as evaluation
import preprocess_ct
import train_adaptive
from tests.helpers import call, write_cases

PLANTED = (b"Mustermann^Erika", b"1964-08-12", b"St. Nowhere Clinic", b"^Erika")
FIELDS = ((148, 80), (228, 24), (328, 16), (14, 18))  # offset and size of a NIfTI-1 header's texts


def plant(path: Path) -> None:
    """Put a patient into every text field of a header and into an extension after it."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    for (offset, size), text in zip(FIELDS, PLANTED, strict=True):
        content[offset : offset + size] = text[:size].ljust(size, b"\0")
    text = b" ".join(PLANTED)
    text += bytes(-(len(text) + 8) % 16)
    extension = struct.pack("<ii", len(text) + 8, 6) + text  # 6: a comment
    content[348:352] = b"\1\0\0\0"
    content[352:352] = extension
    struct.pack_into("<f", content, 108, 352 + len(extension))  # where the voxels begin
    path.write_bytes(gzip.compress(bytes(content)))


def test_planted_patient_is_found_in_no_output(tmp_path, capfd):
    write_cases(tmp_path / "ct", 4)
    for path in (tmp_path / "ct").rglob("*.nii.gz"):
        plant(path)
    out = tmp_path / "out"
    data = ("--data", out / "data", "--device", "cpu")
    split = ("--split", "0.5,0.25,0.25", "--window", "medsam")
    call(preprocess_ct, "--input", tmp_path / "ct", "--out", out / "data", *split)
    call(train_adaptive, *data, "--work-dir", out, "--run", "run", "--epochs", 1)
    report = ("--runs", out / "run", "--out", out / "report", "--device", "cpu", "--no-sweep")
    call(evaluation, *report, "--shift", "15%", "--volume", "--save-predictions")
    shown = capfd.readouterr()
    outputs = {"on the screen": (shown.out + shown.err).encode()}
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            outputs[path.name] = gzip.decompress(content) if path.suffix == ".gz" else content
    assert len(outputs) > 30 and any(name.endswith(".nii.gz") for name in outputs)
    assert {"report.html", "dataset.json", "config.json"} < outputs.keys()
    for name, content in outputs.items():
        for text in PLANTED:
            assert text not in content and text.decode().encode("utf-16-le") not in content, name
