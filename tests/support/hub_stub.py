"""A stub of the hub's data sets: an HTTP server that answers what the hub's client asks."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "f" * 40
FILE_PATH = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
BYTE_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class HubStub:
    """Data sets of the hub. One that is not there answers 401, as the hub does for a private one.

    Args:
        files: by data set (`org/name`), from file name to bytes.

    Attributes:
        address: of the server.
        bytes_sent: of all answers.
    """

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = files
        self.bytes_sent = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.stub = self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self) -> None:
        """Answer, until `stop`."""
        Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def stub(self) -> HubStub:
        return self.server.stub  # type: ignore[attr-defined]

    def log_message(self, *arguments: Any) -> None:
        """Requests are not logged."""

    def do_HEAD(self) -> None:
        """Whether a file is there."""
        file = self.file()
        if file is None:
            self.refuse()
        else:
            self.answer(200, file, ETag=etag(file))

    def do_GET(self) -> None:
        """A file or a part of it, a list of files, or what a data set is."""
        if FILE_PATH.match(self.path):
            self.answer_file()
        elif self.data_set() not in self.stub.files:
            self.refuse()
        elif "/tree/" in self.path:
            self.answer(200, self.tree(self.stub.files[self.data_set()]))
        else:
            siblings = [{"rfilename": name} for name in self.stub.files[self.data_set()]]
            info = {"id": self.data_set(), "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())

    def do_POST(self) -> None:
        """What some paths of a data set are."""
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files = {}
        for name, content in self.stub.files[self.data_set()].items():
            if name in body or name.replace("/", "%2F") in body:
                files[name] = content
        self.answer(200, self.tree(files), Content_Type="application/json")

    def answer_file(self) -> None:
        file = self.file()
        assert file is not None
        wanted = BYTE_RANGE.match(self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, file, ETag=etag(file))
            return
        start = int(wanted[1])
        last = int(wanted[2])
        content_range = f"bytes {start}-{last}/{len(file)}"
        self.answer(206, file[start : last + 1], Content_Range=content_range)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.stub.bytes_sent += len(body)
            self.wfile.write(body)

    def refuse(self) -> None:
        self.answer(401, X_Error_Code="RepoNotFound")

    def data_set(self) -> str:
        """`org/name` of a path of the hub's API."""
        return "/".join(self.path.split("/")[3:5])

    def file(self) -> bytes | None:
        """The file that the path names."""
        match = FILE_PATH.match(self.path)
        if match is None:
            return None
        data_set, name = match.groups()
        return self.stub.files.get(data_set, {}).get(name)

    def tree(self, files: dict[str, bytes]) -> bytes:
        """A list of files, as the hub's API gives it."""
        entries = []
        for name, content in files.items():
            size = len(content)
            entries.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
        return json.dumps(entries).encode()


def etag(file: bytes) -> str:
    """The header by which the hub's client tells files apart."""
    return f'"{hash(file) & 0xFFFF}"'
