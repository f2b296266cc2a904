"""Files and folders that are whole or absent, locks, hashes and JSON."""

import errno
import multiprocessing
import os
import signal

import pytest

from utils.system import UserError, files


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    with files.atomic_write(path, "w") as file:
        file.write("old\n")
    with pytest.raises(RuntimeError), files.atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError
    for write in (files.atomic_write(path / "x"), files.locked(path / ".lock", "busy")):
        with pytest.raises(UserError, match="cannot write"), write:  # a file is in the way
            pass
    assert path.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_reading_and_hashing(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
    files.write_json(tmp_path / "b.json", value := {"ä": [1, 2.5, None]})
    assert files.read_json(tmp_path / "b.json") == value
    for read in (files.sha256, files.read_bytes, files.read_json):
        with pytest.raises(UserError, match="none: cannot read: No such file"):
            read(tmp_path / "none")
    for content, expected in ((b'{"a": "\xff"}', "not valid JSON"), (b"[1]", "found a list")):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=f"a.json: .*{expected}"):
            files.read_json(tmp_path / "a.json")


def hold(path, pipe) -> None:
    with files.locked(path, "busy"):
        pipe.send("held")
        signal.pause()


def test_lock_is_refused_while_held_and_freed_when_its_holder_is_killed(tmp_path):
    path = tmp_path / "new" / ".lock"
    receive, send = multiprocessing.Pipe(duplex=False)
    holder = multiprocessing.Process(target=hold, args=(path, send))
    holder.start()
    receive.recv()
    with pytest.raises(UserError, match="^busy$"), files.locked(path, "busy"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with files.locked(path, "busy"):
        assert path.exists()
    assert not path.exists()


RESULTS = ("report.md", "predictions/**/*.nii.gz")


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(folder.name)


def tree(folder):
    """All files and links by relative path, and empty folders."""
    paths = (path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir()))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


@pytest.mark.parametrize("out", ["out", "deep/er/out", "linked"])
def test_folder_appears_whole(tmp_path, out):
    if out == "linked":
        (tmp_path / "out").mkdir()
        (tmp_path / "linked").symlink_to(tmp_path / "out")
    path = (tmp_path / out).resolve()
    with files.new_folder(tmp_path / out) as folder:
        write(folder, "a", "b/c")
        assert not (path / "a").exists() and folder == path.with_name(".out.partial")
        with pytest.raises(UserError, match="out: another process is writing it"):
            files.new_folder(path).__enter__()
    assert tree(path) == ["a", "b/c"] and [p.name for p in path.parent.glob(".*")] == []


def test_failure_leaves_nothing(tmp_path):
    write(tmp_path / ".out.partial", "of/a killed process")
    for out in (tmp_path / "out", tmp_path / "missing" / "parent" / "out"):
        with pytest.raises(KeyboardInterrupt), files.new_folder(out) as folder:
            assert not any(folder.iterdir())
            write(folder, "a", "b/c")
            raise KeyboardInterrupt
        assert tree(tmp_path) == []


def test_interrupted_folder_is_continued(tmp_path):
    out = tmp_path / "new" / "out"
    for names, left in ((), []), (["a"], ["new/.out.partial/a"]):
        with pytest.raises(RuntimeError), files.new_folder(out, keep_partial=True) as folder:
            write(folder, *names)
            raise RuntimeError
        assert tree(tmp_path) == left
    with files.new_folder(out, keep_partial=True) as folder:
        write(folder, "b")
    assert tree(tmp_path) == ["new/out/a", "new/out/b"]


@pytest.mark.parametrize(("name", "replace"), [("folder", ()), ("file", RESULTS)])
def test_what_is_there_is_refused(tmp_path, name, replace):
    write(tmp_path, "folder/mine", "file")
    with pytest.raises(UserError, match=f"{name}: already exists"):
        files.new_folder(tmp_path / name, replace).__enter__()
    assert tree(tmp_path) == ["file", "folder/mine"]


def test_results_are_replaced_as_a_whole(tmp_path):
    out = tmp_path / "out"
    write(out, "report.md", "predictions/m/a.nii.gz", "predictions/m/toy/b.nii.gz")
    write(tmp_path, "mine/a.nii.gz")
    (out / "predictions" / "link.nii.gz").symlink_to(tmp_path / "mine" / "a.nii.gz")
    with pytest.raises(RuntimeError), files.new_folder(out, RESULTS) as folder:
        write(folder, "report.md")
        raise RuntimeError
    assert len(tree(out)) == 4 and (out / "report.md").read_text() == "out"
    with files.new_folder(out, RESULTS) as folder:
        write(folder, "report.md")
    assert tree(tmp_path) == ["mine/a.nii.gz", "out/report.md"]
    assert (out / "report.md").read_text() == ".out.partial"


@pytest.mark.parametrize("mine", ["notes.txt", "predictions/m/report.md", "predictions/link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_file_of_the_user_is_never_replaced(tmp_path, mine, when):
    out = tmp_path / "out"
    write(out, "report.md", "predictions/m/a.nii.gz")
    write(tmp_path, "other/a.nii.gz")
    if when == "before":
        (out / mine).symlink_to(tmp_path / "other")
    with (
        pytest.raises(UserError, match=f"out: already exists and holds {mine}"),
        files.new_folder(out, RESULTS, keep_partial=True) as folder,
    ):
        write(folder, "report.md")
        (out / mine).symlink_to(tmp_path / "other")
    assert (out / mine / "a.nii.gz").read_text() == tmp_path.name
    assert (out / "report.md").read_text() == "out"
    assert (tmp_path / ".out.partial").exists() == (when == "meanwhile")  # the work is not lost


def test_folder_on_a_full_disk_is_one_line(tmp_path):
    for number, expected in ((errno.ENOSPC, "out: cannot write: No space"), (errno.EIO, "Input")):
        with (
            pytest.raises((UserError, OSError), match=expected),
            files.new_folder(tmp_path / "out"),
        ):
            raise OSError(number, os.strerror(number))
    assert tree(tmp_path) == []
