"""log.csv and curves.png, also while another program has them open."""

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


def test_file_that_another_program_has_open_is_written_after_the_next_epoch(
    tmp_path, monkeypatch, capsys
):
    replace = files.os.replace

    def locked(source, target):
        if target.suffix == ".csv":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    write_log(tmp_path, history(0))
    before = (tmp_path / "log.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", locked)
        write_log(tmp_path, history(1))
    assert (tmp_path / "log.csv").read_text() == before
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"note: {tmp_path / 'log.csv'}: cannot write: Permission denied; ")
    write_log(tmp_path, history(3))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + 4
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "log.csv"}


def test_full_disk_still_stops_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="log.csv: cannot write: No space left on device"):
        write_log(tmp_path, history(0))
