"""The examination: whole where all is well, and a broken part is named and hides no other."""

import http.server
import threading

import pytest

import utils
from common import doctor

pytest.importorskip("mujoco")


@pytest.mark.slow
def test_an_examination_goes_through_everything(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "D4RL_SERVERS", ())
    monkeypatch.setattr(doctor, "OGBENCH_SERVERS", ())
    monkeypatch.setattr(doctor, "pictures", lambda: "drawn elsewhere")
    assert utils.main(["--doctor"]) == 0
    said = capsys.readouterr().out
    assert all(f" {about} " in said for about in ("versions", "cpu", "cuda", "simulator", "training", "packages"))
    assert "updates/s" in said and "BAD" not in said


def test_a_broken_part_is_named_and_the_rest_is_examined(monkeypatch, capsys):
    def broken() -> str:
        raise RuntimeError("the driver is gone")

    for part in ("pictures", "training"):
        monkeypatch.setattr(doctor, part, broken)
    monkeypatch.setattr(doctor, "examine", lambda whole=doctor.examine: whole(servers=False))
    assert utils.main(["--doctor"]) == 1
    said = capsys.readouterr().out
    assert said.count("the driver is gone") == 2 and "packages" in said


def test_a_server_that_answers_and_one_that_is_not_there():
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *words):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        assert doctor.answer_of(url)[0] == "ok" and "answers 403" in doctor.answer_of(url)[2]
    finally:
        server.shutdown()
        server.server_close()
    verdict, _, words = doctor.answer_of(url)
    assert verdict == "no" and url in words and "cannot be reached" in words
