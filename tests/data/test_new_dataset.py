"""The folder that is whole or absent, the workers, and the split by patient."""

import os

import pytest

import preprocess_ct
from tests.helpers import refused
from utils.data.new_dataset import in_workers, new_folder, split_patients


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


def test_split_is_seeded_and_independent_of_order():
    cases = [f"case_{i}" for i in range(50)]
    split = split_patients(cases, (0.8, 0.1, 0.1), 0)
    assert sorted(split) == sorted(cases)
    assert split == split_patients(cases[::-1], (0.8, 0.1, 0.1), 0)
    assert split != split_patients(cases, (0.8, 0.1, 0.1), 1)


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (50, (0.8, 0.1, 0.1), [40, 5, 5]),
        (1, (0.8, 0.1, 0.1), [1, 0, 0]),
        (3, (0.8, 0.1, 0.1), [1, 1, 1]),
        (4, (0, 0, 1), [0, 0, 4]),
        (3, (0, 0.5, 0.5), [0, 2, 1]),
        (92, (0.8, 0.1, 0.1), [74, 9, 9]),
    ],
)
def test_split_counts(count, shares, expected):
    split = split_patients([str(i) for i in range(count)], shares, 0)
    assert [list(split.values()).count(part) for part in ("train", "val", "test")] == expected
