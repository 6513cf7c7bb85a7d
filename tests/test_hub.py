"""Checkpoints from the hub, against a small imitation of it on this machine."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from models import tiny_random

from gptoss_lab import hub, shards
from gptoss_lab.checkpoint import CheckpointError, load
from gptoss_lab.config import FULL, SLIDING, TINY
from gptoss_lab.inspect import inspect
from gptoss_lab.saving import save

MODEL = TINY.with_(n_layers=2, layer_types=(SLIDING, FULL), stop_tokens=(502,))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny-oss"


class Imitation(ThreadingHTTPServer):
    """The four addresses of the hub that a download asks for, with ranges. Every request is kept in `asked`."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked = repos, []
        self.cut_after: int | None = None  # bytes of a weight file after which the connection breaks
        self.wait = 0.0  # seconds between the chunks of a weight file
        self.damage = False
        self.files = {name: {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
                      for name, folder in repos.items()}  # fmt: skip
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Imitation

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, path = self.server, self.path.split("?")[0]
        server.asked.append((self.command, path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?", path):
            files = server.files.get(found[1])
            if files is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            if "tree" in (found[2] or ""):
                content = [self.entry(name, file) for name, file in files.items()]
            else:
                siblings = [{"rfilename": name} for name in files]
                content = {"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
                           "private": False, "gated": False, "disabled": False}  # fmt: skip
            return self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            file = server.files.get(found[1], {}).get(found[2])
            if file is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return self.file(file, body)
        self.answer(404, b"", {}, body)

    def entry(self, name: str, file: Path) -> dict:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        entry = {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest[:40]}
        large = {"lfs": {"oid": digest, "size": entry["size"], "pointerSize": 134}}
        return entry | (large if name.endswith(".safetensors") else {})

    def file(self, file: Path, body: bool):
        data = file.read_bytes()
        weights = file.suffix == ".safetensors"
        digest = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{digest if weights else digest[:40]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.server.damage and weights:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 200
        if body and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        self.answer(status, data, headers, body, slow=weights and body)

    def answer(self, status: int, data: bytes, headers: dict, body: bool, slow: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        sent = 0
        while sent < len(data):
            if slow and self.server.cut_after is not None and sent >= self.server.cut_after:
                self.close_connection = True
                return
            self.wfile.write(data[sent : sent + 10_000])
            self.wfile.flush()
            sent += 10_000
            time.sleep(self.server.wait if slow else 0)


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """What a model on the hub holds, with some that nobody needs."""
    folder = save(tiny_random(MODEL), tmp_path_factory.mktemp("repo") / "x", "hf-mxfp4", max_shard_bytes=300_000)
    for extra in ("original/model.safetensors", "metal/model.bin", "README.md", "tokenizer.json", "model.onnx"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"unneeded")
    return folder


@pytest.fixture
def server(repo, tmp_path, monkeypatch):
    single = save(tiny_random(MODEL), tmp_path / "single")
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"pickle")
    server = Imitation({NAME: repo, "someone/single": single, "someone/pickles": pickles})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def stop(server: Imitation) -> None:
    server.shutdown()
    server.server_close()


def equal(model) -> bool:
    """Is it the model of the repository, its experts packed or not?"""
    want = tiny_random(MODEL).state_dict()
    return all(torch.equal(x, want[name]) for name, x in model.state_dict().items() if name in want)


def client(code: str, url: str, home: Path) -> subprocess.Popen:
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    env.pop("HF_HUB_CACHE", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)


def test_only_the_files_that_are_needed_are_fetched(server, repo):
    folder = hub.download(NAME)
    weights = sorted(path.name for path in repo.glob("*.safetensors"))
    assert len(weights) > 3
    small = hub.SMALL_FILES
    assert sorted(path.name for path in folder.rglob("*")) == sorted(small + weights)
    assert folder.name == COMMIT
    model = load(NAME)
    assert model.config == MODEL and equal(model) and model.tokenizer.n_vocab == 512
    assert model.blocks[0].mlp.down.packed


def test_a_model_in_one_file_is_fetched(server):
    assert equal(load("someone/single"))


def test_a_second_load_fetches_no_file_and_none_is_left_unfinished(server, tmp_path):
    load(NAME)
    server.asked.clear()
    load(NAME)
    assert not [path for method, path, _ in server.asked if method == "GET" and "/resolve/" in path]
    assert not list((tmp_path / "cache").rglob("*.part")) + list((tmp_path / "cache").rglob("*.incomplete"))


def test_without_a_network_what_was_fetched_is_loaded(server):
    load(NAME)
    stop(server)
    assert equal(load(NAME))


def test_offline_mode_asks_nobody(server, monkeypatch):
    load(NAME)
    server.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert equal(load(NAME)) and not server.asked
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        load("someone/single")


def test_without_a_network_what_was_not_fetched_is_told(server):
    stop(server)
    with pytest.raises(ConnectionError, match=f"{NAME} is not complete .*http://127.* did not give the rest"):
        load(NAME)


def test_a_name_that_the_hub_does_not_have_is_told(server):
    with pytest.raises(FileNotFoundError, match="has no model 'someone/nothing': check the name"):
        load("someone/nothing")


def test_a_model_of_pickles_is_refused_and_none_is_fetched(server, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors; pytorch_model\.bin: a pickle"):
        load("someone/pickles")
    assert not [path for _, path, _ in server.asked if path.endswith(".bin")]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, repo):
    server.cut_after = 100_000
    assert equal(load(NAME))
    for path in repo.glob("*.safetensors"):
        asked = [span for method, url, span in server.asked if method == "GET" and url.endswith(path.name)]
        assert asked == [f"bytes={start}-" for start in range(0, path.stat().st_size, 100_000)], path.name


def test_a_connection_that_brings_nothing_more_is_told_and_what_came_is_kept(server, tmp_path):
    server.cut_after = 100_000
    asked = server.asked

    class Dead(list):  # after the first piece nothing comes
        def append(self, one):
            if one[2] == "bytes=100000-":
                server.cut_after = 0
            asked.append(one)

    server.asked = Dead()
    with pytest.raises(ConnectionError, match="What came is kept"):
        load(NAME)
    parts = list((tmp_path / "cache").rglob("*.part"))
    assert [part.stat().st_size for part in parts] == [100_000]
    server.asked, server.cut_after = asked, None
    assert equal(load(NAME))
    assert any(span == "bytes=100000-" for _, _, span in asked[-20:])


def test_a_server_without_ranges_sends_the_file_anew(server, tmp_path, monkeypatch):
    answer = Handler.file

    def whole(self, file, body):
        del self.headers["Range"]
        answer(self, file, body)

    monkeypatch.setattr(Handler, "file", whole)
    file, part, steps = server.files["someone/single"]["model.safetensors"], tmp_path / "part", []
    part.write_bytes(b"x" * 1000)
    size = file.stat().st_size
    hub._fetch_one(f"{server.url}/someone/single/resolve/{COMMIT}/model.safetensors", part, size, steps.append)
    assert part.read_bytes() == file.read_bytes() and sum(steps) == size


def test_a_file_that_came_damaged_is_removed_and_told(server, tmp_path):
    server.damage = True
    with pytest.raises(CheckpointError, match=r"model\.safetensors of someone/single came damaged and was removed"):
        load("someone/single")
    assert not list((tmp_path / "cache").rglob("*.part"))
    server.damage = False
    assert equal(load("someone/single"))


def test_a_disk_that_is_too_small_is_told_before_the_weights_are_fetched(server, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(OSError, match=r"needs [\d,]+ more bytes .* where 500,000 are free"):
        hub.download("someone/single")
    assert not [path for method, path, _ in server.asked if method == "GET" and path.endswith(".safetensors")]


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'gptoss-lab\[hub\]'"):
        load("someone/anything")


def test_inspect_fetches_the_headers_and_not_the_weights(server, repo):
    report = inspect(NAME)
    local = inspect(repo)
    assert (report.parts, report.n_bytes, report.dtypes, report.layout) == (
        local.parts, local.n_bytes, local.dtypes, "hf-mxfp4")  # fmt: skip
    spans = [span for method, path, span in server.asked if method == "GET" and path.endswith(".safetensors")]
    assert spans and all(span.startswith("bytes=0-") or span.startswith("bytes=8-") for span in spans)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


LOAD = f"import gptoss_lab; print(gptoss_lab.load('{NAME}').config.n_layers)"


def test_ctrl_c_while_downloading_keeps_what_came_and_the_next_run_goes_on(server, repo, tmp_path):
    """In processes of their own, to which the hub is what HF_ENDPOINT says."""
    server.wait = 0.05
    process = client(LOAD, server.url, tmp_path / "home")
    for _ in range(600):
        parts = [part for part in (tmp_path / "home").rglob("*.part") if part.stat().st_size >= 20_000]
        if parts or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors, errors
    part, kept = parts[0], parts[0].stat().st_size
    assert kept >= 20_000 and not list((tmp_path / "home").rglob("*.safetensors"))
    server.asked.clear()
    server.wait = 0
    out, errors = client(LOAD, server.url, tmp_path / "home").communicate(timeout=60)
    assert out == "2\n", errors
    assert "downloading someone/tiny-oss" in errors  # the bar
    spans = [span for method, path, span in server.asked if method == "GET" and path.endswith(".safetensors")]
    assert f"bytes={kept}-" in spans and not part.exists()


def test_progress_shows_a_bar_for_much_and_none_for_little(capsys):
    with shards.progress("loading", 10) as note:
        note(10)
    assert capsys.readouterr().err == ""
    with shards.progress("loading", 2 << 30) as note:
        note(1 << 30)
    assert "loading:  50%" in capsys.readouterr().err
