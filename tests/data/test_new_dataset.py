"""The folder that is whole or absent, and the workers."""

import os

import pytest

import preprocess_ct
from tests.helpers import refused
from utils.data.new_dataset import in_workers, new_folder


def test_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), new_folder(out) as folder:
        (folder / "a").write_text("half")
        assert 1 / 0
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()  # left by a run that was killed
    (tmp_path / ".out.partial" / "old").write_text("of the killed run")
    with new_folder(out) as folder:
        (folder / "a").write_text("whole")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["a"]


def test_log_file_shows_how_far_preprocessing_is(monkeypatch, capsys):
    monkeypatch.setattr("utils.system.progress_bar.LINE_SECONDS", 0)
    assert list(in_workers(str.upper, "abc", 1)) == ["A", "B", "C"]
    assert "preprocessing: 3 of 3 cases, 0 s left\n" in capsys.readouterr().err


def exhausted(*_, **__):
    raise MemoryError


def killed(*_, **__):
    os._exit(9)


@pytest.mark.parametrize(("work", "workers"), [(exhausted, 1), (exhausted, 2), (killed, 2)])
def test_running_out_of_memory_is_one_line(
    fails, toy_volumes, tmp_path, monkeypatch, work, workers
):
    monkeypatch.setattr(preprocess_ct, "write_case", work)
    message = refused(fails, toy_volumes, tmp_path / "out", "--workers", workers)
    assert "try fewer --workers" in message
