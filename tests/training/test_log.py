"""log.csv and curves.png, also while another program has them open."""

import csv
import math

import pytest

from perturb import BOX_KINDS
from utils.system import UserError, files
from utils.training.log import write_log


def history(epochs: int) -> list[dict]:
    scores = {f"dsc_{kind}": 0.5 for kind in BOX_KINDS}
    return [
        {"epoch": epoch, "train_loss": 1.0 if epoch else math.nan, "val_loss": 1.0} | scores
        for epoch in range(epochs + 1)
    ]


def rows(folder) -> int:
    with open(folder / "log.csv") as file:
        return len(list(csv.DictReader(file)))


def test_file_that_another_program_has_open_is_written_after_the_next_epoch(
    tmp_path, monkeypatch, capsys
):
    """Windows refuses to replace it."""
    replace = files.os.replace
    write_log(tmp_path, history(0))

    def locked(source, target):
        if target.suffix == ".csv":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", locked)
    write_log(tmp_path, history(1))
    assert rows(tmp_path) == 1
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"note: {tmp_path / 'log.csv'}: cannot write: Permission denied; ")
    monkeypatch.setattr(files.os, "replace", replace)
    write_log(tmp_path, history(3))
    assert rows(tmp_path) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.csv"]


def test_full_disk_still_stops_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="log.csv: cannot write: No space left on device"):
        write_log(tmp_path, history(0))
