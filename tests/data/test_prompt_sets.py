"""Named prompt sets against a stub of the hub: an HTTP server with the repositories' file names and shapes."""

import io
import json
import random
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import huggingface_hub.hf_api
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deradiff.data.prompts import load_prompts

COMMIT = "f" * 40
ANSWERS = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


def parquet(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


class Hub:
    """files: by data set, name to bytes; a data set that is not there answers 401, as the hub does for one that is private or gone."""

    def __init__(self, files):
        self.files, self.sent = files, 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in {
                    "Content-Length": len(body),
                    "X-Repo-Commit": COMMIT,
                    **headers,
                }.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    hub.sent += len(body)
                    self.wfile.write(body)

            def do_HEAD(self):
                if found := ANSWERS.match(self.path):
                    repo, name = found.groups()
                    body = hub.files.get(repo, {}).get(name)
                    if body is not None:
                        return self.answer(200, body, ETag=f'"{hash(body) & 0xFFFF}"')
                self.answer(401, X_Error_Code="RepoNotFound")

            def do_GET(self):
                if found := ANSWERS.match(self.path):
                    body = hub.files[found[1]][found[2]]
                    if wanted := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                        part = body[int(wanted[1]) : int(wanted[2]) + 1]
                        return self.answer(
                            206, part, Content_Range=f"bytes {wanted[1]}-{wanted[2]}/{len(body)}"
                        )
                    return self.answer(200, body, ETag=f'"{hash(body) & 0xFFFF}"')
                repo = "/".join(self.path.split("/")[3:5])
                if repo not in hub.files:
                    return self.answer(401, X_Error_Code="RepoNotFound")
                if "/tree/" in self.path:
                    found = [
                        {"type": "file", "path": n, "size": len(b), "oid": "0" * 40}
                        for n, b in hub.files[repo].items()
                    ]
                    return self.answer(200, json.dumps(found).encode())
                siblings = [{"rfilename": name} for name in hub.files[repo]]
                self.answer(
                    200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
                )

            def do_POST(self):
                asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
                repo = "/".join(self.path.split("/")[3:5])
                found = [
                    {"type": "file", "path": name, "size": len(body), "oid": "0" * 40}
                    for name, body in hub.files[repo].items()
                    if name in asked or name.replace("/", "%2F") in asked
                ]
                self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A function of data sets' files that puts a hub there; the cache is an empty one."""
    servers = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def serve(**files):
        stub = Hub({name.replace("__", "/"): content for name, content in files.items()})
        servers.append(stub.server)
        Thread(target=stub.server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stub.address)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            stub.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stub.address)
        return stub

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def texts(source, limit=None):
    return [prompt.text for prompt in load_prompts(source, limit)]


def test_pick_a_pic_is_one_split_of_captions_from_the_repository_without_pictures(hub):
    wanted = [f"caption {i}" for i in range(5)]
    stub = hub(
        yuvalkirstain__pickapic_v1_no_images={
            "README.md": b"",
            "data/test-00000-of-00001-75d003ad32a6ef60.parquet": b"another split",
            "data/test_unique-00000-of-00001-73a51cbb6488571d.parquet": parquet(
                caption=wanted, label_0=[0.5] * 5
            ),
            "data/train-00000-of-00001-b138676ed2d1f52a.parquet": b"168 MB",
        }
    )
    assert texts("pickapic") == wanted
    stub.server.shutdown()
    stub.files.clear()
    assert texts("pickapic") == wanted, (
        "a hub that is gone is no reason to stop a run that had the captions"
    )


def test_of_a_repository_with_pictures_the_captions_alone_are_sent(hub):
    wanted, pictures = (
        [f"caption {i}" for i in range(6)],
        [random.Random(i).randbytes(400_000) for i in range(6)],
    )
    table = parquet(jpg_0=pictures, caption=wanted, jpg_1=[p[::-1] for p in pictures])
    stub = hub(
        **{
            "pickapic-anonymous__pickapic_v1": {
                "data/test_unique-00000-of-00001.parquet": table,
                "data/test-0.parquet": b"",
            }
        }
    )
    assert texts("pickapic") == wanted
    assert stub.sent < len(table) / 8


def test_hpdv2_is_its_four_styles_from_the_first_repository_that_answers(hub):
    styles = {
        f"benchmark/{s}.json": json.dumps([f"{s} {i}" for i in range(3)]).encode()
        for s in ("photo", "anime", "paintings")
    }
    styles |= {
        "benchmark/concept-art.json": b'["concept-art 0"]',
        "benchmark/benchmark_imgs/CM.tar.gz": b"139 MB",
    }
    hub(ymhao__HPDv2=styles)
    found = texts("hpdv2")
    assert found[:4] == ["anime 0", "anime 1", "anime 2", "concept-art 0"] and len(found) == 10
    assert [text.split()[0] for text in texts("hpdv2", limit=5)] == [
        "anime",
        "anime",
        "paintings",
        "paintings",
        "photo",
    ]


def test_tables_of_other_kinds(hub):
    hub(
        **{
            "nateraw__parti-prompts": {
                "PartiPrompts.tsv": b'Prompt\tCategory\na "red" fox\tAnimals\n',
                "README.md": b"",
            },
            "sayakpaul__drawbench": {
                "data/train-00000-of-00001-a.parquet": parquet(Prompts=["a fox"], Category=["x"])
            },
        }
    )
    assert texts("partiprompts") == ['a "red" fox'] and texts("drawbench") == ["a fox"]


@pytest.mark.parametrize("name", ["pickapic", "hpdv2", "partiprompts"])
def test_a_set_that_nobody_gives_names_the_local_way_in_one_sentence(hub, name):
    hub(**{"nateraw__parti-prompts": {"other.parquet": parquet(text=["a"])}})
    with pytest.raises(ValueError) as error:
        load_prompts(name)
    said = str(error.value)
    assert (
        "\n" not in said
        and f"the prompt set {name} could not be read" in said
        and "give that file as the prompts" in said
    )
    assert ("no column Prompt" if name == "partiprompts" else "RepositoryNotFoundError") in said


def test_a_limit_is_spread_over_the_list_and_changes_no_id():
    whole = load_prompts([f"prompt {i % 7}" for i in range(10)])
    assert [p.text for p in load_prompts([f"prompt {i}" for i in range(10)], 4)] == [
        f"prompt {i}" for i in (0, 2, 5, 7)
    ]
    assert set(load_prompts([f"prompt {i % 7}" for i in range(10)], 3)) < set(
        whole
    ) and load_prompts(["a"], 9) == load_prompts(["a"])
