"""Questions about images to a server with an OpenAI-style chat endpoint.

What the server cannot do now is asked again: too many requests, faults of the server, answers that
are torn or do not come in time. What will not help to ask again is refused in one sentence. No
message holds the API key.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import requests
from PIL import Image
from requests.adapters import HTTPAdapter

from deradiff.image_tables import encode_png
from deradiff.scorers.spec import Endpoint
from deradiff.texts import printable

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Message = dict[str, Any]
"""A message of a conversation, as the endpoint takes it."""

ATTEMPTS = 8
"""How often a request is made before its question is given up: over about two minutes."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 60.0
"""Seconds before the second attempt, twice as many before each further one, and the most."""

LONGEST_HOLD = 600.0
"""Seconds that a server may ask to wait; more of them are told to the user."""

MOST_BYTES = 2**22
"""Of an answer: 4 MiB."""

SHOWN = 200
"""Characters of a server's words in a message."""

SEED = 0

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that ask for another attempt."""


class NoAnswer(ValueError):
    """A question that the server or its model does not answer; other questions may do better."""


class Stopped(Exception):
    """The work was given up while a request waited for its turn."""


class _Again(Exception):
    """An attempt that failed and may succeed later.

    Args:
        reason: why, in a few words.
        seconds: that the server asks to wait; None: it does not say.
        holds_all: whether other requests should wait, too.
    """

    def __init__(self, reason: str, seconds: float | None = None, holds_all: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.seconds = seconds
        self.holds_all = holds_all


class Clock:
    """The time, and waiting for it to pass; tests have another one."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, seconds: float, stopped: threading.Event) -> None:
        """Wait for some seconds, or until the event is set."""
        stopped.wait(seconds)


class Pace:
    """When the next request may start.

    Args:
        per_minute: requests in a minute, at most; None: any number.
        clock: of the waiting.
    """

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self.gap = 60 / per_minute if per_minute else 0.0
        self.clock = clock
        self.stopped = threading.Event()
        self._next = 0.0
        self._lock = threading.Lock()

    def wait_for_turn(self) -> None:
        """Return when a request may start.

        Raises:
            Stopped: where nobody wants it any more.
        """
        while True:
            with self._lock:
                now = self.clock.now()
                seconds = self._next - now
                if seconds <= 0:
                    self._next = now + self.gap
                    return
            self.pause(seconds)

    def pause(self, seconds: float) -> None:
        """Wait. Raises Stopped where nobody wants the result any more."""
        self.clock.wait(seconds, self.stopped)
        if self.stopped.is_set():
            raise Stopped

    def hold(self, seconds: float) -> None:
        """Let no request start before some seconds have passed."""
        with self._lock:
            self._next = max(self._next, self.clock.now() + seconds)


@dataclass
class Usage:
    """What was asked of a server, and what it cost.

    Attributes:
        answers: that came whole.
        repeats: attempts beyond the first.
        read: tokens that the model read.
        written: tokens that it wrote.
        uncounted: answers of which the server did not say the tokens.
    """

    answers: int = 0
    repeats: int = 0
    read: int = 0
    written: int = 0
    uncounted: int = 0

    def cost(self, endpoint: Endpoint) -> float | None:
        """The cost, in the unit of the prices; None where a price is not known."""
        if endpoint.price_in is None or endpoint.price_out is None:
            return None
        return (self.read * endpoint.price_in + self.written * endpoint.price_out) / 1e6

    def amount(self, endpoint: Endpoint) -> str:
        """The cost, or else the tokens, in a few words."""
        cost = self.cost(endpoint)
        if cost is None:
            return f"{self.read + self.written:,} tokens"
        return f"cost {cost:.2f}"

    def sentence(self, endpoint: Endpoint) -> str:
        """What was asked, for people."""
        parts = [f"{self.answers:,} answers of {endpoint.model}"]
        if self.repeats:
            parts.append(f"{self.repeats:,} requests repeated")
        parts.append(f"{self.read:,} tokens read and {self.written:,} written")
        if self.uncounted:
            parts.append(f"the server did not count those of {self.uncounted:,} answers")
        if self.cost(endpoint) is not None:
            parts.append(self.amount(endpoint))
        return ", ".join(parts)


class _BearerKey(requests.auth.AuthBase):
    """Sends the API key where there is one, and never what a .netrc file has for the host."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request


def api_key(endpoint: Endpoint) -> str | None:
    """The API key of an endpoint, from its environment variable.

    Raises:
        ValueError: where the variable is not set, or holds no key.
    """
    variable = endpoint.api_key_variable
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"api_key_variable={variable} names an environment variable that is not set: type "
            f"export {variable}=<the key> first"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"the environment variable {variable} holds no key: it has spaces or characters that "
            "no key has"
        )
    return key


def images_message(images: Sequence[Image.Image], question: str, side: int | None) -> Message:
    """The message of a question about images: the images in order, then the text.

    Args:
        images: RGB.
        question: about them.
        side: longest side of an image that is sent, in pixels; None: images as they are.
    """
    content: list[Message] = []
    for image in images:
        encoded = base64.b64encode(encode_png(_reduced(image, side))).decode()
        address = {"url": f"data:image/png;base64,{encoded}"}
        content.append({"type": "image_url", "image_url": address})
    content.append({"type": "text", "text": question})
    return {"role": "user", "content": content}


def _reduced(image: Image.Image, side: int | None) -> Image.Image:
    """An image whose longest side is at most `side`."""
    longest = max(image.size)
    if side is None or longest <= side:
        return image
    width = max(1, round(image.width * side / longest))
    height = max(1, round(image.height * side / longest))
    return image.resize((width, height), Image.Resampling.LANCZOS)


class ChatClient:
    """A server, asked by several threads at once.

    Args:
        endpoint: the server.
        clock: of the waiting.

    Attributes:
        usage: what was asked so far.

    Raises:
        ValueError: where the API key is not there.
    """

    def __init__(self, endpoint: Endpoint, clock: Clock | None = None) -> None:
        self.endpoint = endpoint
        self.usage = Usage()
        self.in_flight = endpoint.in_flight
        self.clock = clock or Clock()
        self._pace = Pace(endpoint.per_minute, self.clock)
        self._key = api_key(endpoint)
        self._has_answered = False
        self._lock = threading.Lock()

        # What the server does not know is left out, once it has said so
        self._options: dict[str, Any] = {"seed": SEED, "max_tokens": endpoint.max_tokens}
        if endpoint.temperature is not None:
            self._options["temperature"] = endpoint.temperature

        address = endpoint.url.rstrip("/")
        if not address.endswith("/chat/completions"):
            address += "/chat/completions"
        self._address = address
        self._session = requests.Session()
        self._session.auth = _BearerKey(self._key)
        # A proxy would see what is meant for this machine
        self._session.trust_env = not endpoint.is_loopback
        adapter = HTTPAdapter(pool_maxsize=endpoint.in_flight)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def divide(self, processes: int) -> None:
        """Keep to this process's share of the limits, which hold for all processes together."""
        self.in_flight = max(1, self.endpoint.in_flight // processes)
        self._pace.gap *= processes

    def for_each(self, work: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Work on items, several at once, in threads.

        After the first error no further item is begun; those that have begun are ended. After
        Ctrl-C they go on by themselves, and keep what they still get.

        Args:
            work: called with each item, in a thread.
            items: what to work on.

        Raises:
            Exception: the first of `work`.
        """
        stopped = self._pace.stopped
        stopped.clear()

        def begin(item: Item) -> None:
            if stopped.is_set():
                return
            try:
                work(item)
            except BaseException:
                stopped.set()
                raise

        executor = ThreadPoolExecutor(self.in_flight)
        try:
            futures = [executor.submit(begin, item) for item in items]
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        executor.shutdown(cancel_futures=True)
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error

    def ask(self, messages: Sequence[Message]) -> str:
        """The model's answer to the last of some messages.

        Raises:
            NoAnswer: where it gives none.
            ValueError: where the server cannot be asked at all.
        """
        reason = ""
        for attempt in range(ATTEMPTS):
            self._pace.wait_for_turn()
            try:
                return self._attempt(messages)
            except _Again as again:
                reason = again.reason
                self._before_next(attempt, again)
        raise ValueError(f"{self.endpoint.host} did not answer in {ATTEMPTS} attempts: {reason}")

    def _before_next(self, attempt: int, again: _Again) -> None:
        """Wait before the next attempt. Raises ValueError where the server asks for too long."""
        with self._lock:
            self.usage.repeats += 1
        seconds = again.seconds
        if seconds is None:
            longest = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)
            seconds = longest * random.uniform(0.5, 1)
        if seconds > LONGEST_HOLD:
            raise ValueError(
                f"{self.endpoint.host} takes no request for {seconds / 60:.0f} minutes "
                f"({again.reason}): try again then"
            )
        if again.holds_all:
            self._pace.hold(seconds)
        else:
            self._pace.pause(seconds)

    def _attempt(self, messages: Sequence[Message]) -> str:
        """One request. Raises _Again, NoAnswer and ValueError."""
        with self._lock:
            options = dict(self._options)
        body = {"model": self.endpoint.model, "messages": list(messages), **options}
        status, headers, content = self._post(body)
        if 300 <= status < 400:
            elsewhere = self._shown(headers.get("Location", "elsewhere"))
            raise ValueError(
                f"{self.endpoint.host} sends requests on to {elsewhere}, which is not followed: "
                "give url=<that address> if it is the server's own"
            )
        if status == 200:
            return self._answer(content)
        self._refuse(status, headers, content, options)
        raise AssertionError("a refusal raises")

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Send a request; the status, the headers and the content of what comes back."""
        try:
            with self._session.post(
                self._address,
                json=body,
                timeout=self.endpoint.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                self._has_answered = True
                content = b""
                for part in response.iter_content(2**16):
                    content += part
                    if len(content) > MOST_BYTES:
                        raise _Again(f"its answer has more than {MOST_BYTES} bytes")
                return response.status_code, response.headers, content
        except requests.exceptions.SSLError as error:
            raise ValueError(
                f"{self.endpoint.host} has no certificate that can be trusted: look at the address"
            ) from error
        except requests.exceptions.Timeout as error:
            raise _Again(f"no answer within {self.endpoint.timeout:g} s") from error
        except requests.exceptions.RequestException as error:
            name = type(error).__name__
            is_lost = isinstance(error, requests.exceptions.ConnectionError)
            if is_lost and not self._has_answered:
                raise ValueError(
                    f"no server answers at {self.endpoint.host} ({name}): give url=<its address>, "
                    "or start it"
                ) from error
            raise _Again(name) from error

    def _answer(self, content: bytes) -> str:
        """The text of an answer. Raises _Again for what is no answer, NoAnswer for a refusal."""
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            message = choice["message"]
            text = message.get("content")
            why = choice.get("finish_reason")
            refusal = message.get("refusal")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise _Again("an answer that is torn, or none of a chat endpoint") from error
        self._count(body.get("usage"))
        if refusal:
            raise NoAnswer(f"the model refuses to answer: {self._shown(refusal)}")
        if why == "length":
            raise NoAnswer(
                f"the answer was cut off after {self.endpoint.max_tokens} tokens: give "
                "max_tokens=<more>"
            )
        if why == "content_filter":
            raise NoAnswer("the server's content filter stopped the answer")
        if not isinstance(text, str):
            raise _Again("an answer without text")
        return text

    def _count(self, usage: Any) -> None:
        """Add an answer and its tokens."""
        counts = usage if isinstance(usage, dict) else {}
        read = counts.get("prompt_tokens")
        written = counts.get("completion_tokens")
        with self._lock:
            self.usage.answers += 1
            if isinstance(read, int) and isinstance(written, int):
                self.usage.read += read
                self.usage.written += written
            else:
                self.usage.uncounted += 1

    def _refuse(self, status: int, headers: Any, content: bytes, options: dict[str, Any]) -> None:
        """Raise what a status other than 200 means."""
        words = _words_of(content)
        said = f"HTTP {status}{f', {self._shown(words)}' if words else ''}"
        if status in AGAIN:
            seconds = self._seconds_to_wait(headers.get("Retry-After"))
            raise _Again(said, seconds, holds_all=status in (429, 503))
        if status in (400, 422):
            self._leave_out(words, options)
            raise NoAnswer(f"the server refuses the request: {said}")
        if status in (401, 403):
            variable = self.endpoint.api_key_variable
            remedy = f"look at the key in {variable}"
            if variable is None:
                remedy = "give api_key_variable=<the environment variable that holds the key>"
            raise ValueError(f"{self.endpoint.host} does not let you in ({said}): {remedy}")
        if status == 404:
            raise ValueError(
                f"{self.endpoint.host} has no chat endpoint there, or no model "
                f"{self.endpoint.model} ({said}): give url=<its address up to /v1>, or the model's "
                "name as the server has it"
            )
        if status == 413:
            raise NoAnswer(
                f"the image is too large for the server ({said}): give image_side=<1024>"
            )
        raise ValueError(f"{self.endpoint.host} refuses requests: {said}")

    def _leave_out(self, words: str, options: dict[str, Any]) -> None:
        """Leave out an option that the server says it does not know; raises _Again to go on."""
        if "seed" in options and _names(words, "seed"):
            with self._lock:
                self._options.pop("seed", None)
            raise _Again("the server knows no seed", seconds=0)
        if "max_tokens" in options and "max_tokens" in words:
            with self._lock:
                self._options.pop("max_tokens", None)
                self._options["max_completion_tokens"] = self.endpoint.max_tokens
            raise _Again("the server knows no max_tokens", seconds=0)
        if "temperature" in options and _names(words, "temperature"):
            raise ValueError(
                f"{self.endpoint.model} takes no temperature of {self.endpoint.temperature:g} "
                f"({self._shown(words)}): give model=<another one>, or temperature=null and "
                "answers that vary"
            )

    def _seconds_to_wait(self, text: str | None) -> float | None:
        """What a Retry-After header says: a number of seconds, or a date."""
        if text is None:
            return None
        try:
            return max(0.0, float(text))
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - self.clock.date())
        except ValueError:
            return None

    def _shown(self, words: Any) -> str:
        """A server's words on one line, without the key."""
        text = str(words)
        if self._key is not None:
            text = text.replace(self._key, "***")
        return printable(" ".join(text.split()))[:SHOWN]


def _words_of(content: bytes) -> str:
    """What a server says of an error, in any of the forms that servers have."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content[:SHOWN].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        parts = [error.get("message"), error.get("detail")]
        if error.get("param"):
            parts.append(f"({error['param']!r})")
        return " ".join(str(part) for part in parts if part)
    return str(error)


def _names(words: str, option: str) -> bool:
    """Whether a server's words name an option, which all servers put in quotes; prompts do not."""
    return any(f"{quote}{option}{quote}" in words for quote in "'\"`")
