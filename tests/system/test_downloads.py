"""Downloads from a local server that misbehaves as remote ones do, and archives."""

import hashlib
import http.server
import json
import re
import threading
import zipfile

import pytest

import preprocess_ct
import train_adaptive
from tests.helpers import call, write_cases
from utils.model.segmenter import MODELS
from utils.system import UserError, downloads
from utils.system.downloads import Source, fetch, unpack
from utils.system.files import locked

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under every path; breaks off after `sends` bytes; may ignore ranges."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sends, self.requests = CONTENT, len(CONTENT), []
        self.ranges, self.status = True, 200  # another status is sent instead of an answer

    def source(self, sha256=DIGEST, file="file.bin"):
        return Source(f"http://127.0.0.1:{self.server_port}/{file}?download=1", "free", sha256)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, total = self.server, len(self.server.content)
        server.requests.append(self.headers["Range"])
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if server.status != 200 or start >= total:
            self.send_error(server.status if server.status != 200 else 416)
            return
        start = start if server.ranges else 0
        self.send_response(206 if server.ranges else 200)
        if server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        self.wfile.write(server.content[start:][: server.sends])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_is_downloaded_once(server, tmp_path, capsys):
    path = fetch(server.source(), tmp_path / "new")
    assert path.read_bytes() == CONTENT and names(tmp_path / "new") == ["file.bin"]
    assert f"downloading {server.source().url} to {path}; free" in capsys.readouterr().out
    assert fetch(server.source(), tmp_path / "new") == path and len(server.requests) == 1
    with (
        locked(tmp_path / ".file.bin.lock", "busy"),
        pytest.raises(UserError, match="another process is downloading it"),
    ):
        fetch(server.source(), tmp_path)


@pytest.mark.parametrize(("received", "ranges"), [(1000, True), (1000, False), (1_024_000, True)])
def test_next_call_resumes(server, tmp_path, received, ranges):
    server.sends, server.ranges = received, ranges
    if received < len(CONTENT):
        message = "connection ended at 1,000 of 1,024,000 bytes.*; run the same command again"
        with pytest.raises(UserError, match=message):
            fetch(server.source(), tmp_path)
    else:  # by a process that was killed at the end
        (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert names(tmp_path) == ["file.bin.part"]
    server.sends = len(CONTENT)
    assert fetch(server.source(), tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == f"bytes={received - 1}-" and names(tmp_path) == ["file.bin"]


def test_wrong_bytes_are_refused(server, tmp_path):
    server.content = CONTENT[::-1]
    for _ in ("just downloaded", "there before"):
        with pytest.raises(UserError, match="file.bin: not the file at .*; remove it"):
            fetch(server.source(), tmp_path)
    assert len(server.requests) == 1


def test_failure_says_what_to_put_where(server, tmp_path):
    server.status = 404
    target = re.escape(str(tmp_path / "file.bin"))
    with pytest.raises(UserError, match=f"Not Found.*another way and put it at {target}"):
        fetch(server.source(), tmp_path)
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*refused.*\)"):
        fetch(Source("http://127.0.0.1:9/file.bin", "free"), tmp_path)
    assert names(tmp_path) == []


def test_archive_is_unpacked_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("one/file", CONTENT)
    content = path.read_bytes()
    for damaged in (content[:5000] + b"x" + content[5001:], content[:5000]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            unpack(path, tmp_path / "a")
        assert names(tmp_path) == ["a.zip"]
    path.write_bytes(content)
    unpack(path, tmp_path / "a")
    assert (tmp_path / "a" / "one" / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("inside", ["", "FLARE22Train/"])
def test_data_set_in_one_command(server, tmp_path, monkeypatch, capfd, fails, inside):
    write_cases(tmp_path / "made", 3)
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as file:
        for path in sorted((tmp_path / "made").rglob("*.nii.gz")):
            file.write(path, inside + path.relative_to(tmp_path / "made").as_posix())
        file.writestr("__MACOSX/images/._toy_0_0000.nii.gz", b"of a Mac")
    server.content = (tmp_path / "made.zip").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(downloads.DATA, "flare22", server.source(digest, "FLARE22Train.zip"))
    out = tmp_path / "data" / "flare22"
    options = ["--download", "flare22", "--out", out, "--workers", 1]
    call(preprocess_ct, *options)
    assert len(json.loads((out / "dataset.json").read_text())["cases"]) == 3
    assert names(tmp_path / "data") == ["FLARE22Train", "FLARE22Train.zip", "flare22"]
    assert "FLARE22Train.zip can be removed" in capfd.readouterr().out
    assert "already exists" in fails(preprocess_ct, *options)
    (out.parent / "FLARE22Train.zip").unlink()  # as the message allows
    call(preprocess_ct, *options[:3], out.parent / "again", *options[4:])
    assert len(server.requests) == 1


def test_registry_is_complete():
    assert set(downloads.WEIGHTS) == set(MODELS) - {"lite_medsam"}
    for source in (*downloads.DATA.values(), *downloads.WEIGHTS.values()):
        assert source.url.startswith("https://") and source.file in source.url
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)


def test_weights_are_fetched_into_the_work_dir(server, toy_slices, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(downloads.WEIGHTS, "sam_vit_b", server.source(None, "sam.pth"))
    work = tmp_path / "work"
    start = ["--checkpoint", "download", "--work-dir", work, "--run", "r", "--data", toy_slices]
    assert "lite_medsam needs none" in fails(train_adaptive, *start)
    start += ["--model", "sam_vit_b"]
    assert "--lr" in fails(train_adaptive, *start, "--lr", "-1")
    assert not server.requests and not work.exists()  # all else is checked before
    assert str(work / "sam.pth") in fails(train_adaptive, *start)  # they are no weights
    assert (work / "sam.pth").read_bytes() == CONTENT
