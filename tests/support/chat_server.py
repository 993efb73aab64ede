"""A server with an OpenAI-style chat endpoint, on this machine, that answers as a test says."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from deradiff.image_files import decode_image
from deradiff.scorers.chat import Clock

DATA_START = "data:image/png;base64,"


@dataclass
class Question:
    """One request, as the server got it.

    Attributes:
        path: of the address.
        headers: by name.
        body: the parsed JSON.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def images(self) -> list[Image.Image]:
        """The images of the first message, decoded."""
        images = []
        for part in self.body["messages"][0]["content"]:
            if part["type"] == "image_url":
                address = part["image_url"]["url"]
                assert address.startswith(DATA_START)
                images.append(decode_image(base64.b64decode(address.removeprefix(DATA_START))))
        return images

    @property
    def text(self) -> str:
        """The text of the first message."""
        (text,) = [part["text"] for part in self.body["messages"][0]["content"] if "text" in part]
        return text

    @property
    def level(self) -> int:
        """The grey level of the first image."""
        return self.images[0].getpixel((0, 0))[0]


@dataclass
class Reply:
    """What the server sends back.

    Attributes:
        content: text is the model's answer; a dict is the whole body; bytes are sent as they are.
        status: of HTTP.
        headers: by name.
    """

    content: str | dict[str, Any] | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """The body."""
        if isinstance(self.content, bytes):
            return self.content
        body = self.content
        if isinstance(body, str):
            body = answer(body)
        return json.dumps(body).encode()


def answer(text: Any, **more: Any) -> dict[str, Any]:
    """The body of an answer of a model; 100 tokens were read and 5 written."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 5}}


def error(message: str, status: int = 400, **headers: str) -> Reply:
    """The body of an error, as most servers have it."""
    return Reply({"error": {"message": message}}, status, headers)


class ChatServer:
    """The server's state.

    Attributes:
        respond: gives the reply to a question.
        questions: that came, in order.
        most_at_once: of the questions that were being answered.
        url: of the API.
    """

    def __init__(self, port: int) -> None:
        self.respond: Callable[[Question], Reply] = lambda question: Reply('{"score": 7}')
        self.questions: list[Question] = []
        self.most_at_once = 0
        self.url = f"http://127.0.0.1:{port}/v1"
        self._now = 0
        self._lock = threading.Lock()

    def replies(self, *replies: Reply | str) -> None:
        """Answer with these in turn, and with the last one for ever."""
        waiting = [Reply(one) if isinstance(one, str) else one for one in replies]

        def respond(question: Question) -> Reply:
            with self._lock:
                return waiting.pop(0) if len(waiting) > 1 else waiting[0]

        self.respond = respond

    def handle(self, question: Question) -> Reply:
        """Note a question and answer it."""
        with self._lock:
            self.questions.append(question)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.respond(question)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A server that runs for as long as the block."""
    state: ChatServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 2**16  # head and body in one packet: two cost 40 ms

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = state.handle(Question(self.path, dict(self.headers), body))
            content = reply.encoded()
            self.send_response(reply.status)
            length = {"Content-Length": str(len(content))}
            for name, value in (length | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
            if reply.headers.get("Content-Length"):
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            """Nothing is printed."""

        def handle_one_request(self) -> None:
            """A client that does not wait for its answer is no error of the server."""
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = ChatServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class QuickClock(Clock):
    """A clock that waits in no time, and notes for how long.

    Attributes:
        waits: seconds of each wait.
    """

    def __init__(self) -> None:
        self.time = 1000.0
        self.waits: list[float] = []
        self._lock = threading.Lock()

    def now(self) -> float:
        return self.time

    def date(self) -> float:
        return self.time

    def wait(self, seconds: float, stopped: threading.Event) -> None:
        with self._lock:
            self.waits.append(seconds)
            self.time += seconds
