"""A reward behind a real HTTP server that does what each test asks of it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from rescore.rewards.http import THREADS, HttpScorer, png
from rescore.rewards.images import to_bytes
from rescore.rewards.reward import Reward, RewardError
from rescore.training.run import describe
from rescore.types import Conditions

IMAGES = torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
TEXTS = ["a", "bé", "", "d\n", "e"]
SECRET = "s3cr3t-t0k3n"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Server:
    """Answers every request with ``answer(request, number)``: a status and a body."""

    def __init__(self, answer):
        self.answer, self.requests, self.headers = answer, [], []
        self.lock, self.at_once, self.most = threading.Lock(), 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append(content)
                    outer.headers.append(dict(self.headers))
                    number = len(outer.requests)
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                try:
                    status, body, *more = outer.answer(content, number)
                finally:
                    with outer.lock:
                        outer.at_once -= 1
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in [body] if isinstance(body, bytes) else body:
                    self.wfile.write(piece)
                    self.wfile.flush()

            def log_message(self, format, *args):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass  # clients that give up close the connection

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/score"


@contextmanager
def serving(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def decoded(content):
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(i)))) for i in content["images"]]


def brightness(content, number=0):
    """A reward the client can compute too: the mean level."""
    rewards = [float(image.mean()) for image in decoded(content)]
    return 200, json.dumps({"rewards": rewards, "model": "any"}).encode()


def said(rewards):
    return lambda content, number: (200, json.dumps({"rewards": rewards}).encode())


def quick(url, **more):
    return HttpScorer(url=url, **{"timeout": 5.0, "retries": 0, "backoff": 0.01, **more})


def ended(within):
    """Whether no request is under way any more, at the latest after so many seconds."""
    end = time.monotonic() + within
    while any(thread.name == THREADS for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


# What goes right


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_what_pillow_reads(channels):
    pixels = to_bytes(IMAGES[:, :channels])[0]
    image = Image.open(io.BytesIO(png(pixels)))
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    image.load()  # checks the sums
    assert np.array_equal(np.asarray(image).reshape(4, 6, channels), pixels.numpy())


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_rewards_come_back_in_order_whatever_the_batches(batch):
    """The first requests are answered last."""

    def late(content, number):
        time.sleep(0.1 / number)
        return brightness(content)

    with serving(late) as server:
        rewards = quick(server.url, batch=batch)(IMAGES, TEXTS)
    torch.testing.assert_close(rewards, to_bytes(IMAGES).float().flatten(1).mean(1))
    assert rewards.dtype == torch.float32
    sent = Counter(text for content in server.requests for text in content["texts"])
    assert sent == Counter(TEXTS)
    assert len(server.requests) == -(-5 // batch)


def test_without_texts_none_are_sent():
    with serving(brightness) as server:
        quick(server.url)(IMAGES[:, :1])
    assert set(server.requests[0]) == {"images"}
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in server.headers[0]


def test_no_images_need_no_server():
    assert quick("http://127.0.0.1:9/score")(IMAGES[:0], []).shape == (0,)


def test_requests_at_a_time_are_bounded():
    def slow(content, number):
        time.sleep(0.05)
        return brightness(content)

    with serving(slow) as server:
        quick(server.url, batch=1, workers=2)(IMAGES)
    assert server.most == 2


def test_a_token_comes_from_the_environment(monkeypatch):
    with serving(brightness) as server:
        scorer = quick(server.url, token_from="SCORER_TOKEN")
        for value in ("", "two\nlines", "é"):
            monkeypatch.setenv("SCORER_TOKEN", value)
            with pytest.raises(ValueError, match="SCORER_TOKEN is not set or holds no token"):
                scorer(IMAGES)
        monkeypatch.setenv("SCORER_TOKEN", SECRET)
        scorer(IMAGES)
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_tried_again(status):
    def recovers(content, number):
        return (status, b"busy") if number < 3 else brightness(content)

    with serving(recovers) as server:
        rewards = quick(server.url, retries=2)(IMAGES)
        assert len(server.requests) == 3
    torch.testing.assert_close(rewards, to_bytes(IMAGES).float().flatten(1).mean(1))


def test_waits_double():
    """0.1 s and 0.2 s before the second and the third try."""
    with serving(lambda content, number: (500, b"")) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match="failed 3 times"):
            quick(server.url, retries=2, backoff=0.1)(IMAGES)
        assert 0.3 <= time.monotonic() - start < 2


# What goes wrong


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda c, n: (200, b"<html>hello"), "answered '<html>hello'; expected the JSON object"),
        (lambda c, n: (200, b"\xff\xfe\x00"), "expected the JSON object"),
        (lambda c, n: (200, b""), "answered ''; expected"),
        (lambda c, n: (200, b"[" * 100_000), "expected the JSON object"),  # too deep to parse
        (lambda c, n: (200, b"[1, 2, 3, 4, 5]"), r"answered '\[1, 2, 3, 4, 5\]'; expected the"),
        (lambda c, n: (200, b'{"rewards": 5}'), "with 5 numbers"),
        (lambda c, n: (200, b'{"reward": [1]}'), "with 5 numbers"),
        (said([1.0, 2.0, 3.0, 4.0]), "answered 4 rewards for 5 images"),
        (said([0.0] * 6), "answered 6 rewards for 5 images"),
        (said([0, 0, float("nan"), 0, 0]), "answered 'NaN' for image 2; expected a finite"),
        (said([0, 0, 0, float("-inf"), 0]), "answered '-Infinity' for image 3"),
        (said([0, 1e39, 0, 0, 0]), r"'1e\+39' for image 1"),  # infinite in float32
        (said([10**400, 0, 0, 0, 0]), r"for image 0; expected a finite"),
        (said([0, 0, 0, 0, None]), "'null' for image 4"),
        (said([0, 0, 0, 0, True]), "'true' for image 4"),
        (said(["1", 0, 0, 0, 0]), "for image 0"),
        (lambda c, n: (200, (b" " * (1 << 20) for _ in range(9))), "more than 4194304 bytes"),
        (lambda c, n: (404, b"no such page"), r"status 404 \('no such page'\); expected 200"),
        (lambda c, n: (401, SECRET.encode()), r"status 401 \('\*\*\*'\)"),
        (lambda c, n: (400, f"no: {SECRET}!".encode()), r"status 400 \('no: \*\*\*!'\)"),
        (lambda c, n: (302, b"", {"Location": "http://u:pw@host/x?key=pw"}), "to 'http://host/x'"),
        (lambda c, n: (307, b"", {"Location": "file:///etc/passwd"}), "not followed"),
        (lambda c, n: (307, b"", {"Location": "http://[pw@"}), "not followed"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(monkeypatch, answer, complaint):
    """One request, whatever the retries: the message has the server, what it said, what it is to
    say, and no secret."""
    monkeypatch.setenv("SCORER_TOKEN", SECRET)
    with serving(answer) as server:
        scorer = quick(server.url, retries=3, token_from="SCORER_TOKEN")
        with pytest.raises(RewardError, match=complaint) as caught:
            scorer(IMAGES)
        assert len(server.requests) == 1
    message = str(caught.value)
    assert message.startswith(f"the reward server {server.url} ")
    assert len(message) < 350
    for secret in (SECRET, "pw@", "key="):
        assert secret not in message


def test_the_offending_image_is_counted_from_the_first_of_all():
    """In the second request of two images."""

    def second(content, number):
        bad = TEXTS[3] in content["texts"]
        return 200, json.dumps({"rewards": [0.5, float("nan") if bad else 1.0]}).encode()

    with serving(second) as server, pytest.raises(RewardError, match="'NaN' for image 3"):
        quick(server.url, batch=2)(IMAGES[:4], TEXTS[:4])


def test_a_dead_port_is_named_after_every_try():
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(
            RewardError, match=rf"{re.escape(url)} failed 3 times.*ConnectionRefusedError.*see that"
        ):
            quick(url, retries=2)(IMAGES)


def test_a_slow_server_is_given_up():
    """Every try ends in time; so does the whole, though the server would take much longer."""
    over = threading.Event()

    def slow(content, number):
        over.wait(10)
        return brightness(content)

    with serving(slow) as server:
        start = time.monotonic()
        with pytest.raises(
            RewardError, match=r"failed 2 times.*no answer in 0\.1 s.*raise timeout"
        ):
            quick(server.url, timeout=0.1, retries=1)(IMAGES)
        with pytest.raises(RewardError, match=r"answered 0 of 5 requests in 0\.2 s"):
            quick(server.url, timeout=30.0, deadline=0.2, batch=1)(IMAGES)
        assert ended(within=1)
        assert time.monotonic() - start < 3
        over.set()


@pytest.mark.parametrize("part", ["head", "body", "error"])
def test_an_answer_that_trickles_is_given_up(part):
    """Something comes before every timeout of the socket, and the whole never does."""
    over = threading.Event()

    def trickle():
        while not over.wait(0.05):
            yield b" "

    def answer(content, number):
        return 400 if part == "error" else 200, trickle()

    if part == "head":
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not over.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(RewardError, match=r"answered 0 of 1 requests in 0\.4 s"):
            quick(url, timeout=0.2, deadline=0.4)(IMAGES)
        over.set()
        thread.join()
        listener.close()
        return
    expected = "status 400" if part == "error" else r"failed 1 times.*no answer in 0\.2 s"
    with serving(answer) as server:
        start = time.monotonic()
        with pytest.raises(RewardError, match=expected):
            quick(server.url, timeout=0.2)(IMAGES)
        assert time.monotonic() - start < 2
        over.set()


def test_the_deadline_ends_a_call_and_says_what_went_wrong_last():
    """Tries go on until then."""
    with serving(lambda content, number: (503, b"loading the model")) as server:
        with pytest.raises(
            RewardError, match=r"in 0\.3 s; the last failure: status 503 \('loading"
        ):
            quick(server.url, retries=1000, backoff=0.001, deadline=0.3)(IMAGES)
        assert len(server.requests) > 2


def test_the_first_failure_ends_the_others():
    """Requests that are waiting are not sent."""
    with serving(lambda content, number: (404, b"")) as server:
        with pytest.raises(RewardError, match="404"):
            quick(server.url, batch=1, workers=1)(IMAGES)
        assert ended(within=1)
        assert len(server.requests) <= 2


def test_a_request_that_hangs_does_not_keep_the_process():
    """One is refused, the others would wait 30 s for their answers."""
    over = threading.Event()

    def answer(content, number):
        if number > 1:
            over.wait(30)
        return 404, b""

    program = """
import sys, torch
from rescore.rewards.http import HttpScorer
HttpScorer(url=sys.argv[1], batch=1, workers=3, timeout=30.0)(torch.rand(3, 1, 4, 4))
"""
    with serving(answer) as server:
        try:
            ended = subprocess.run(
                [sys.executable, "-c", program, server.url], capture_output=True, timeout=20
            )
        finally:
            over.set()
    assert ended.returncode == 1 and b"status 404" in ended.stderr


def test_an_answer_that_breaks_off_is_tried_again():
    def answer(content, number):
        whole = brightness(content)[1]
        return 200, whole[:20] if number == 1 else whole, {"Content-Length": str(len(whole))}

    with serving(answer) as server:
        quick(server.url, retries=1)(IMAGES)
        assert len(server.requests) == 2


def test_a_failing_server_is_asked_once_by_a_reward():
    """The search for the sample at fault would wait for it again for every sample."""
    prompts = Conditions(group=torch.arange(5), sample_id=torch.arange(5), info={}, inputs={})
    with serving(lambda content, number: (400, b"")) as server:
        scorer = quick(server.url)
        reward = Reward({"far": lambda images, prompts: scorer(images)})
        with pytest.raises(RewardError, match="'far': the reward server .* status 400"):
            reward.terms(IMAGES, prompts)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("file:///etc/passwd", "scheme 'file'; expected http"),
        ("ftp://host/x", "scheme 'ftp'"),
        ("localhost:8000/score", "scheme 'localhost'"),
        ("score", "scheme ''"),
        ("http://", "no host"),
        ("http:///score", "no host"),
        ("http://host:port/", "no valid host or port"),
        ("http://[hidden", "no valid host or port"),
        ("http://host/a b", "characters"),
        ("http://host/\x01", "characters"),
        ("http://host/é", "characters"),
        ("http://user:hidden@host/", "user name or password.*token_from"),
        ("http://host/score?key=hidden", "query.*run.json.*token_from"),
        ("http://host?hidden", "query"),
        ("http://host/score#hidden", "fragment"),
    ],
)
def test_a_url_that_is_none_is_refused(url, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        HttpScorer(url=url)
    assert "hidden" not in str(caught.value)


def test_what_a_run_keeps_of_a_scorer_holds_no_token(monkeypatch):
    """run.json has the name of the variable; its value may be another one when a run resumes."""
    monkeypatch.setenv("SCORER_TOKEN", SECRET)
    scorer = HttpScorer(url="http://host/score", token_from="SCORER_TOKEN")
    kept = describe(scorer)
    assert SECRET not in f"{kept} {scorer}" and kept["token_from"] == "SCORER_TOKEN"
    monkeypatch.setenv("SCORER_TOKEN", "another")
    assert describe(scorer) == kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"workers": 0},
        {"retries": -1},
        {"backoff": float("nan")},
        {"backoff": float("inf")},
        {"backoff": -0.1},
        {"timeout": 0.0},
        {"deadline": float("inf")},
    ],
)
def test_a_field_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HttpScorer(url="http://host/", **wrong)
