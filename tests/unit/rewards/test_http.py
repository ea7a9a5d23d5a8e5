"""A scorer behind HTTP, against a real server: right, wrong, slow, away."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import urllib3.util.retry
from PIL import Image

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import check, http, load

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
PROMPTS = ["a red circle", "ein blaues Viereck – schräg", "三"]


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, the last again and again."""

    daemon_threads = True

    def __init__(self, *answers: tuple[int, dict[str, str], str] | Callable[[dict], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = list(answers), []
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        status, headers, text = (200, {}, answer(body)) if callable(answer) else answer
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the other side has given up waiting

    def do_GET(self) -> None:
        self.server.asked.append((self.path, None))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*answers: object) -> Server:
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def score(url: str, **options: object) -> np.ndarray:
    options = {"url": url, "timeout": 5, "retries": 0, **options}
    spec = Reward(name="far", kind="http", options=options)
    return load(spec, torch.device("cpu")).score(IMAGES, PROMPTS)


def brightness(body: dict) -> str:
    files = [io.BytesIO(base64.b64decode(image)) for image in body["images"]]
    return json.dumps({"scores": [float(np.asarray(Image.open(f)).mean()) for f in files]})


def text(answer: object, status: int = 200) -> tuple[int, dict[str, str], str]:
    return status, {}, answer if isinstance(answer, str) else json.dumps(answer)


GOOD = text({"scores": [0, 1.5, -2e3]})


def test_pictures_and_prompts_arrive_unchanged_and_in_order(serve):
    server = serve(brightness)
    found = score(server.url)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, IMAGES.mean((1, 2, 3)), rtol=1e-6)
    ((path, body),) = server.asked
    assert (path, body["prompts"], set(body)) == ("/score", PROMPTS, {"prompts", "images"})
    (*_, last) = [Image.open(io.BytesIO(base64.b64decode(i))) for i in body["images"]]
    assert last.format == "PNG"
    np.testing.assert_array_equal(np.asarray(last), IMAGES[2])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(serve, status):
    server = serve(text("busy", status), text("busy", status), GOOD)
    assert score(server.url, retries=2).tolist() == [0, 1.5, -2000]
    assert len(server.asked) == 3
    assert server.asked[0] == server.asked[2]


def test_retry_after_is_heeded_up_to_the_longest_pause(serve, monkeypatch):
    monkeypatch.setattr(http, "LONGEST_PAUSE", 0.3)
    server = serve((503, {"Retry-After": "30"}, ""), GOOD)
    began = time.perf_counter()
    score(server.url, retries=1)
    assert 0.3 <= time.perf_counter() - began < 30


def test_pauses_double(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(urllib3.util.retry.time, "sleep", pauses.append)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="5 tries"):
            score(f"http://127.0.0.1:{nobody.getsockname()[1]}/", retries=4)
    assert pauses == pytest.approx([0.02, 0.04, 0.08])


def test_a_server_that_comes_up_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.1)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    late: list[ThreadingHTTPServer] = []

    def start() -> None:
        late.append(ThreadingHTTPServer(("127.0.0.1", port), Handler))
        late[0].answers, late[0].asked = [GOOD], []
        late[0].serve_forever(0.01)

    timer = threading.Timer(0.1, start)
    timer.start()
    try:
        assert len(score(f"http://127.0.0.1:{port}/", retries=6)) == 3
    finally:
        timer.join(0)
        late[0].shutdown()
        late[0].server_close()


def test_a_server_that_is_away_is_named_with_the_tries():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        words = rf"reward 'far': {url} cannot be reached \(2 tries\): start the server or correct "
        with pytest.raises(ValueError, match=words):
            score(url, retries=1)


def test_a_slow_server_is_named_with_the_time(serve):
    def slow(_: dict) -> str:
        time.sleep(1)
        return "{}"

    server = serve(slow)
    words = r"did not answer within 0\.2 s \(2 tries\): raise options\.timeout"
    with pytest.raises(ValueError, match=words):
        score(server.url, timeout=0.2, retries=1)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (text("no such page", 404), "status 404: 'no such page'"),
        (text("busy", 503), "status 503: 'busy'"),
        (text("<html>hello"), "no JSON but '<html>hello'"),
        (text([1, 2, 3]), r"no list under `scores` in \[1, 2, 3\]"),
        (text({"score": [1]}), "no list under `scores`"),
        (text({"scores": [1, 2]}), "2 scores for 3 pictures"),
        (text({"scores": [1, "2", 3]}), "the score '2', which is not a finite number"),
        (text({"scores": [1, True, 3]}), "the score True"),
        (text({"scores": [1, None, 3]}), "the score None"),
        (text('{"scores": [1, NaN, 3]}'), "the score nan"),
    ],
)
def test_a_wrong_answer_is_shown_with_the_remedy(serve, answer, words):
    server = serve(answer)
    sentence = rf"reward 'far': {server.url} answered with {words}.*: correct the server, see docs"
    with pytest.raises(ValueError, match=sentence):
        score(server.url)
    assert len(server.asked) == 1


def test_a_redirect_is_not_followed(serve):
    other = serve(GOOD)
    server = serve((307, {"Location": other.url}, ""))
    with pytest.raises(ValueError, match=rf"redirects to {other.url}, which is not followed"):
        score(server.url)
    assert other.asked == []


def test_a_long_answer_is_cut(serve):
    with pytest.raises(ValueError, match="status 400") as caught:
        score(serve(text("x" * 100_000, 400)).url)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"options\.url"),
        ({"url": "ftp://x"}, r"options\.url is 'ftp://x'"),
        ({"url": "http://x", "timeout": 0}, r"options\.timeout is 0"),
        ({"url": "http://x", "token": "t"}, r"options\.token .*options of http: url, timeout"),
    ],
)
def test_options_are_checked_before_anything_starts(options, words):
    with pytest.raises(ConfigError, match=f"reward 'far': {words}"):
        check(Reward(name="far", kind="http", options=options))
