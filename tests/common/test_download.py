"""The downloader against a local server that misbehaves on command."""

import errno
import hashlib
import http.server
import os
import shutil
import socket
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest

from common import download as module
from common.download import DownloadError
from d4rl_utils.datasets import download
from d4rl_utils.names import REGISTRY

NAME = "hopper-medium-v2"
BODY = bytes(i * 7 % 251 for i in range(100_000))


class Handler(http.server.BaseHTTPRequestHandler):
    """Behaves as the next word in `server.script[path]` says; the last word holds for all further requests."""

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        script = server.script[self.path]
        word = script.pop(0) if len(script) > 1 else script[0]
        server.seen.append((self.path, asked))
        if word.isdigit():
            return self.send_error(int(word))
        body = b"x" * len(BODY) if word == "forged" else BODY
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and "no range" not in word else 0
        if word == "login page":
            body, begin = b"<html>log in</html>", 0
        self.send_response(206 if begin else 200)
        if word == "endless":
            body = BODY * 2
        else:
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        part = body[begin : begin + 30_000] if word in ("cut", "no range, cut", "stall") else body[begin:]
        if word != "hang up":
            self.wfile.write(part)
        if word == "stall":
            server.over.wait(5)

    def log_message(self, *args):
        pass


Handler.protocol_version = "HTTP/1.0"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server, the registry pointing at its /primary and /mirror, and no waiting between attempts."""
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.script, web.seen, web.over = {"/primary": ["ok"], "/mirror": ["404"]}, [], threading.Event()
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    base = f"http://127.0.0.1:{web.server_port}"
    entry = REGISTRY[NAME]._replace(
        size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest(), urls=(f"{base}/primary", f"{base}/mirror")
    )
    monkeypatch.setitem(REGISTRY, NAME, entry)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    web.base, web.target, web.part = base, tmp_path / entry.file, tmp_path / f"{entry.file}.part"
    web.get = lambda **options: download(NAME, tmp_path, **{"backoff": lambda n: 0, "timeout": 5, **options})
    yield web
    web.over.set()
    web.shutdown()
    thread.join()
    web.server_close()


def refused(server, *words):
    """The download fails, with these words, and leaves nothing under the file's name."""
    with pytest.raises(DownloadError) as error:
        server.get()
    text = str(error.value)
    assert not server.target.exists()
    for word in (*words, "/primary", "/mirror", "By hand", str(server.target), "--dataset_dir"):
        assert word in text, (word, text)
    return text


def arrived(server):
    return server.get() == server.target and server.target.read_bytes() == BODY and not server.part.exists()


def test_a_good_server_is_asked_once(server):
    assert arrived(server) and arrived(server)
    assert server.seen == [("/primary", None)]


def test_cuts_are_resumed_by_range(server):
    server.script["/primary"] = ["cut", "cut", "hang up", "cut", "503", "ok"]
    assert arrived(server)
    assert [asked for _, asked in server.seen] == [None, "bytes=30000-", *["bytes=60000-"] * 2, *["bytes=90000-"] * 2]


def test_a_server_that_ignores_range_starts_over(server):
    server.script["/primary"] = ["cut", "no range"]
    assert arrived(server)


def test_no_progress_ends(server):
    server.script["/primary"] = ["no range, cut"]  # always from zero, always cut at the same place
    refused(server, "cut at 30000 of 100000 bytes; gave up after 5 attempts", "HTTP 404")
    assert len(server.seen) == 5 + 1
    assert server.part.stat().st_size == 30_000  # for the next time


def test_a_stall_counts_as_a_cut(server):
    server.script["/primary"] = ["stall", "ok"]
    began = time.perf_counter()
    assert server.get(timeout=0.3) == server.target and server.target.read_bytes() == BODY
    assert time.perf_counter() - began < 3
    assert server.seen[1] == ("/primary", "bytes=30000-")


def test_a_server_that_never_answers(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        urls = (f"http://127.0.0.1:{deaf.getsockname()[1]}/primary", f"{server.base}/mirror")
        monkeypatch.setitem(REGISTRY, NAME, REGISTRY[NAME]._replace(urls=urls))
        with pytest.raises(DownloadError, match="no answer within 0.2 s; gave up after 2 attempts"):
            server.get(timeout=0.2, attempts=2)


@pytest.mark.parametrize("code", ["403", "404", "410"])
def test_a_plain_no_goes_straight_to_the_mirror(server, code):
    server.script = {"/primary": [code], "/mirror": ["ok"]}
    assert arrived(server)
    assert [path for path, _ in server.seen] == ["/primary", "/mirror"]


def test_the_mirror_resumes_what_the_primary_began(server):
    server.script = {"/primary": ["cut", "404"], "/mirror": ["ok"]}
    assert arrived(server) and server.seen[-1] == ("/mirror", "bytes=30000-")


def test_every_reason_is_told(server):
    server.script = {"/primary": ["403"], "/mirror": ["500"]}
    refused(server, "primary: HTTP 403 Forbidden", "mirror: HTTP 500", "gave up after 5 attempts", "0.1 MB")


def test_a_wrong_checksum_is_removed(server):
    server.script = {"/primary": ["forged"], "/mirror": ["forged"]}
    refused(server, "sent another file: its SHA-256 is", REGISTRY[NAME].sha256, "removed")
    assert not server.part.exists() and len(server.seen) == 2


@pytest.mark.parametrize("word, reason", [("login page", "offers 19 bytes"), ("endless", "sends more than the 100000")])
def test_another_page_in_its_place(server, word, reason):
    server.script["/primary"] = [word]
    refused(server, reason)
    server.script["/mirror"] = ["ok"]
    assert arrived(server)


def test_the_half_of_an_earlier_process_is_used(server):
    server.part.write_bytes(BODY[:40_000])
    assert arrived(server) and server.seen == [("/primary", "bytes=40000-")]


def test_a_whole_part_only_needs_its_name(server):
    server.part.write_bytes(BODY)
    assert arrived(server) and server.seen == []


def test_a_bad_half_is_found_out_and_fetched_again(server):
    server.part.write_bytes(b"y" * 40_000)
    assert arrived(server) and server.seen == [("/primary", "bytes=40000-"), ("/primary", None)]


def test_a_part_larger_than_the_whole_is_thrown_away(server):
    server.part.write_bytes(BODY + b"more")
    assert arrived(server) and server.seen == [("/primary", None)]


def test_416_begins_again(server):
    server.part.write_bytes(BODY[:40_000])
    server.script["/primary"] = ["416", "ok"]
    assert arrived(server) and server.seen == [("/primary", "bytes=40000-"), ("/primary", None)]


def test_unreachable_hosts_fail_at_once(server, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    urls = (f"http://127.0.0.1:{port}/primary", "http://no-such-host.invalid/mirror")
    monkeypatch.setitem(REGISTRY, NAME, REGISTRY[NAME]._replace(urls=urls))
    monkeypatch.setattr(module.time, "sleep", lambda s: pytest.fail("nothing to wait for"))
    began = time.perf_counter()
    refused(server, "primary: cannot be reached", "mirror: cannot be reached")
    assert time.perf_counter() - began < 5


def test_waiting_grows_between_attempts(server, monkeypatch):
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.script["/primary"] = ["503"]
    with pytest.raises(DownloadError):
        download(NAME, server.target.parent)
    assert slept == [2.0, 4.0, 8.0, 16.0]


def test_a_disk_too_small_is_said_before_the_first_byte(server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 60_000))
    with pytest.raises(OSError, match="100000 more bytes are needed, 60000 are free.*--dataset_dir") as error:
        server.get()
    assert error.value.errno == errno.ENOSPC and server.seen == []
    server.part.write_bytes(BODY[:50_000])  # the other half fits
    assert arrived(server)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up(server):
    server.part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="full disk: 100000 more bytes are needed.*what has arrived is kept") as error:
        server.get()
    assert error.value.errno == errno.ENOSPC and not server.target.exists() and len(server.seen) == 1


def test_two_processes_download_once(server):
    server.script["/primary"] = ["cut", "stall", "ok"]
    done = [SimpleNamespace(path=None) for _ in range(2)]
    threads = [threading.Thread(target=lambda d=d: setattr(d, "path", server.get(timeout=0.3))) for d in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [d.path for d in done] == [server.target] * 2 and server.target.read_bytes() == BODY
    assert len(server.seen) == 3
