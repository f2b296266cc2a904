"""Files that are whole or absent, locks, hashes and JSON."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal

import pytest

from utils.system import files
from utils.system.errors import UserError


def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    with files.atomic_write(path, "w") as file:
        file.write("old\n")
    with pytest.raises(RuntimeError), files.atomic_write(path, "w") as file:
        file.write("half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_write_where_nothing_can_be_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("in the way")
    with pytest.raises(UserError, match="cannot write"), files.atomic_write(path / "x"):
        pass
    with pytest.raises(UserError, match="cannot write here"):
        files.check_writable(path)
    with pytest.raises(UserError, match="cannot write"), files.locked(path / ".lock", "busy"):
        pass


def test_reading_and_hashing(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
    for read in (files.sha256, files.read_bytes, files.read_json):
        with pytest.raises(UserError, match="none: cannot read: No such file"):
            read(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1]", "expected a JSON object, found a list"),
    ],
)
def test_json_that_is_not_ours(tmp_path, content, expected):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json: {expected}"):
        files.read_json(tmp_path / "a.json")


def test_json_keeps_its_values_and_loses_the_checksum_of_earlier_versions(tmp_path):
    path, value = tmp_path / "a.json", {"ä": [1, 2.5, None]}
    files.write_json(path, value)
    assert files.read_json(path) == json.loads(path.read_text()) == value
    files.write_json(path, value | {"sha256": "0"})
    assert files.read_json(path) == value


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "a\\b", "C:x", "x\0y", "x\ny", None, 1])
def test_names_that_are_no_plain_file_names(text):
    assert not files.is_file_name(text)
    assert files.is_file_name("case 1.é")


# --- Locks ---------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def unsupported(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with files.locked(tmp_path / ".lock", "busy"):
        assert f"{tmp_path}: this file system has no locks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
