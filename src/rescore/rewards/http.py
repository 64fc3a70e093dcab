"""A reward behind an HTTP server, which may be slow, elsewhere, and written in anything.

Every request is a POST of a JSON object ``{"images": [...], "texts": [...]}``: PNG files in base64,
grey or RGB, 8 bits; ``texts`` is there where the images have texts. The answer is
``{"rewards": [...]}``, a finite number per image, in order. What else is in it is not read.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import queue
import re
import struct
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from rescore.rewards.images import Images, checked_texts, to_bytes
from rescore.rewards.reward import RewardError

LARGEST_ANSWER = 1 << 22
"""Bytes."""
LARGEST_REWARD = torch.finfo(torch.float32).max
WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of servers that may do better next time."""
THREADS = "rescore-http"
"""Name of the threads that wait for answers."""


class _TryAgain(Exception):
    """A request failed in a way that may pass."""


@dataclass(frozen=True)
class _Call:
    """What the requests of one call share."""

    end: float
    """When the call must be over, on the monotonic clock."""
    token: str
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for answers any more."""
    failures: list[str] = field(default_factory=list)
    """What went wrong and was tried again, in order."""


@dataclass(frozen=True, kw_only=True)
class HttpScorer:
    """Rewards of images, and of texts if there are any, from a server: see the module.

    A run writes the URL into its run.json and shows it in messages, so there must be no secret in
    it: one that holds a query or a password is refused. The token is never written or shown.

    Raises:
        ValueError: a field is out of range.
    """

    url: str
    """Where requests go, http or https, without a query. Redirects are not followed."""
    batch: int = 16
    """The most images in a request."""
    workers: int = 4
    """Requests at a time."""
    timeout: float = 60.0
    """Seconds in which a request must be answered."""
    retries: int = 3
    """Further tries where there is no connection, no answer in time, or a status such as 503."""
    backoff: float = 0.5
    """Seconds before the first further try; each next one waits twice as long."""
    deadline: float = 600.0
    """Seconds in which all requests of a batch must be answered, tries included."""
    token_from: str = ""
    """Environment variable with a token, sent as ``Authorization: Bearer``; none if empty."""

    def __post_init__(self) -> None:
        _check_url(self.url)
        for name, least in (("batch", 1), ("workers", 1), ("retries", 0), ("backoff", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more")
        for name in ("timeout", "deadline"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected seconds above 0")

    def __call__(
        self, images: Images, texts: Sequence[str] | None = None, /
    ) -> Float[Tensor, " B"]:
        """One number per image, as the server says.

        Raises:
            RewardError: the server is dead, slow, or answers something else.
            ValueError: the images or the texts are not what they must be, or the token is missing.
        """
        pixels, n = to_bytes(images), len(images)
        written = None if texts is None else checked_texts(texts, n)
        call = _Call(end=time.monotonic() + self.deadline, token=self._token())
        starts = range(0, n, self.batch)
        try:
            rewards = self._in_parallel(
                call, lambda first: self._rewards(call, pixels, written, first), starts
            )
        finally:
            call.stop.set()
        in_order = [reward for first in starts for reward in rewards[first]]
        return torch.tensor(in_order, dtype=torch.float32, device=images.device)

    def _in_parallel(
        self, call: _Call, ask: Callable[[int], list[float]], starts: Sequence[int]
    ) -> dict[int, list[float]]:
        """What ``ask`` gives for every start, ``workers`` at a time; the first failure ends all.

        The threads are daemons: a request that hangs does not keep the process from ending.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[int, list[float] | Exception]] = queue.SimpleQueue()
        for first in starts:
            waiting.put(first)

        def work() -> None:
            with suppress(queue.Empty):
                while not call.stop.is_set():
                    first = waiting.get_nowait()
                    try:
                        answers.put((first, ask(first)))
                    except Exception as error:  # raised again below
                        answers.put((first, error))

        for _ in range(min(self.workers, len(starts))):
            threading.Thread(target=work, name=THREADS, daemon=True).start()
        rewards: dict[int, list[float]] = {}
        while len(rewards) < len(starts):
            try:
                first, answer = answers.get(timeout=max(call.end - time.monotonic(), 0))
            except queue.Empty:
                last = f"; the last failure: {call.failures[-1]}" if call.failures else ""
                raise RewardError(
                    f"{self._place} answered {len(rewards)} of {len(starts)} requests in "
                    f"{self.deadline:g} s{last}; make the server faster, or raise deadline or "
                    f"workers"
                ) from None
            if isinstance(answer, Exception):
                raise answer
            rewards[first] = answer
        return rewards

    @property
    def _place(self) -> str:
        """The server as messages name it."""
        return f"the reward server {self.url}"

    def _token(self) -> str:
        token = os.environ.get(self.token_from, "") if self.token_from else ""
        if self.token_from and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError(
                f"the environment variable {self.token_from} is not set or holds no token; "
                f"{self._place} is to get one from it"
            )
        return token

    def _rewards(
        self,
        call: _Call,
        pixels: UInt8[Tensor, "B H W C"],
        texts: list[str] | None,
        first: int,
    ) -> list[float]:
        """The rewards of one request's images, in as many tries as are allowed."""
        rows = slice(first, first + self.batch)
        content: dict[str, list[str]] = {
            "images": [base64.b64encode(png(image)).decode() for image in pixels[rows]]
        }
        if texts is not None:
            content["texts"] = texts[rows]
        body = json.dumps(content).encode()
        problem = "no answer"
        for attempt in range(self.retries + 1):
            if attempt and call.stop.wait(self.backoff * 2 ** (attempt - 1)):
                break
            try:
                answer = self._post(call, body)
            except _TryAgain as failure:
                if time.monotonic() >= call.end:
                    call.stop.wait()  # whoever called tells of the deadline
                    break
                problem = str(failure)
                call.failures.append(problem)
            else:
                return self._read(call, answer, len(content["images"]), first)
        raise RewardError(
            f"{self._place} failed {self.retries + 1} times, the last time so: {problem}; see that "
            f"it runs and that the url is right, or raise timeout or retries"
        )

    def _post(self, call: _Call, body: bytes) -> bytes:
        """What the server answers to one request."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if call.token:
            headers["Authorization"] = f"Bearer {call.token}"
        end = min(call.end, time.monotonic() + self.timeout)
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            left = max(end - time.monotonic(), 0.001)
            with _opener().open(request, timeout=left) as response:
                return self._body(response, end)
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(call, error, end)
        except TimeoutError:
            raise _TryAgain(f"no answer in {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise _TryAgain(f"no connection in {self.timeout:g} s") from None
            raise _TryAgain(f"{type(cause).__name__}: {cause}") from None

    def _body(self, response: http.client.HTTPResponse, end: float) -> bytes:
        """The whole answer, however it trickles in."""
        answer = b""
        while part := response.read1(1 << 16):
            answer += part
            if len(answer) > LARGEST_ANSWER:
                raise RewardError(
                    f"{self._place} answered more than {LARGEST_ANSWER} bytes; expected a number "
                    f"per image"
                )
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:  # what was announced and did not come
            raise http.client.IncompleteRead(answer, response.length)
        return answer

    def _refuse(self, call: _Call, error: urllib.error.HTTPError, end: float) -> NoReturn:
        """Raise what an answer with another status than 2xx means."""
        if 300 <= error.code < 400:
            target = self._masked(call, _shown(error.headers.get("Location", "")))
            raise RewardError(
                f"{self._place} redirects to '{target}'; redirects are not followed, give the "
                f"final url"
            )
        body: Any = error.fp
        said = b""
        with suppress(OSError, http.client.HTTPException):
            while time.monotonic() < end and len(said) < 1 << 12:
                part = body.read1(1 << 12)
                if not part:
                    break
                said += part
        problem = f"status {error.code} ({self._excerpt(call, said)})"
        if error.code in WORTH_A_RETRY:
            raise _TryAgain(problem)
        raise RewardError(
            f"{self._place} answered with {problem}; expected 200: look at its log, and at the url "
            f"and the token"
        )

    def _read(self, call: _Call, answer: bytes, n: int, first: int) -> list[float]:
        """The rewards in an answer, each looked at."""
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError):
            content = None
        rewards = content.get("rewards") if isinstance(content, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(
                f"{self._place} answered {self._excerpt(call, answer)}; expected the JSON object "
                f'{{"rewards": [...]}} with {n} numbers'
            )
        if len(rewards) != n:
            raise RewardError(
                f"{self._place} answered {len(rewards)} rewards for {n} images; expected one each"
            )
        for place, reward in enumerate(rewards, start=first):
            number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
            if not number or not abs(reward) <= LARGEST_REWARD:
                said = self._excerpt(call, json.dumps(reward).encode())
                raise RewardError(
                    f"{self._place} answered {said} for image {place}; expected a finite number"
                )
        return rewards

    def _excerpt(self, call: _Call, answer: bytes) -> str:
        """The beginning of an answer, quoted, without what a message must not show."""
        text = self._masked(call, answer[: 1 << 12].decode(errors="replace"))
        return repr(text if len(text) <= 80 else text[:80] + "...")

    def _masked(self, call: _Call, text: str) -> str:
        """A text without the token."""
        return text.replace(call.token, "***") if call.token else text


def png(pixels: UInt8[Tensor, "H W C"]) -> bytes:
    """A PNG file, grey or RGB, without loss.

    Source: W3C, Portable Network Graphics (PNG) Specification, third edition, sections 5 and 11.

    Args:
        pixels: C is 1 or 3.
    """
    height, width, channels = pixels.shape
    colour = {1: 0, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    rows = torch.cat([pixels.new_zeros(height, 1), pixels.flatten(1)], 1)  # 0: no filter
    data = zlib.compress(rows.numpy().tobytes())
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _opener() -> urllib.request.OpenerDirector:
    """Knows http, https and the proxies of the environment: no files, no redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler,
    ):
        opener.add_handler(handler())
    return opener


def _check_url(url: str) -> None:
    """Refuse what no request can be sent to, without repeating it: it may hold a password."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("url has no valid host or port; expected http://host:port/path") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"url has the scheme '{parts.scheme}'; expected http:// or https://")
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            "url has no host, or characters that a URL has not; expected http://host:port/path, "
            "others written as %XX"
        )
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ValueError(
            "url holds a user name or password, a query (?...) or a fragment (#...), which would "
            "be written into run.json; put a token into an environment variable and name it in "
            "token_from, and settings of the server into the path"
        )


def _shown(url: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url)[0])
