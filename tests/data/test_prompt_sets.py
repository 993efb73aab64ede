"""Named prompt sets, read from a stub of the hub with the repositories' file names and shapes."""

import io
import json
import random

import huggingface_hub.constants
import huggingface_hub.hf_api
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deradiff.data.prompts import load_prompts
from tests.support.hub_stub import HubStub


def parquet(**columns):
    """The bytes of a table."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function of data sets' files that starts a hub with them; its client's cache is empty."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stubs = []

    def start(files):
        stub = HubStub(files)
        stubs.append(stub)
        stub.start()
        file_address = stub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", stub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file_address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stub.address)
        return stub

    yield start
    for stub in stubs:
        stub.stop()


def texts(source, limit=None):
    return [prompt.text for prompt in load_prompts(source, limit)]


def test_pick_a_pic_is_one_split_of_captions_from_the_repository_without_images(serve):
    captions = [f"caption {i}" for i in range(5)]
    table = parquet(caption=captions, label_0=[0.5] * 5)
    files = {
        "README.md": b"",
        "data/test-00000-of-00001-75d003ad32a6ef60.parquet": b"another split",
        "data/test_unique-00000-of-00001-73a51cbb6488571d.parquet": table,
        "data/train-00000-of-00001-b138676ed2d1f52a.parquet": b"168 MB",
    }
    stub = serve({"yuvalkirstain/pickapic_v1_no_images": files})
    assert texts("pickapic") == captions

    # A hub that is gone does not stop a run that had the captions
    stub.server.shutdown()
    stub.files.clear()
    assert texts("pickapic") == captions


def test_of_a_repository_with_images_the_captions_alone_are_sent(serve):
    captions = [f"caption {i}" for i in range(6)]
    first = [random.Random(i).randbytes(400_000) for i in range(6)]
    second = [image[::-1] for image in first]
    table = parquet(jpg_0=first, caption=captions, jpg_1=second)
    files = {"data/test_unique-00000-of-00001.parquet": table, "data/test-0.parquet": b""}
    stub = serve({"pickapic-anonymous/pickapic_v1": files})
    assert texts("pickapic") == captions
    assert stub.bytes_sent < len(table) / 8


def test_hpdv2_is_its_four_styles_from_the_first_repository_that_answers(serve):
    files = {}
    for style in ("photo", "anime", "paintings"):
        prompts = [f"{style} {i}" for i in range(3)]
        files[f"benchmark/{style}.json"] = json.dumps(prompts).encode()
    files["benchmark/concept-art.json"] = b'["concept-art 0"]'
    files["benchmark/benchmark_imgs/CM.tar.gz"] = b"139 MB"
    serve({"ymhao/HPDv2": files})

    prompts = texts("hpdv2")
    assert len(prompts) == 10
    assert prompts[:4] == ["anime 0", "anime 1", "anime 2", "concept-art 0"]
    styles = [text.split()[0] for text in texts("hpdv2", limit=5)]
    assert styles == ["anime", "anime", "paintings", "paintings", "photo"]


def test_tables_of_other_kinds(serve):
    table = b'Prompt\tCategory\na "red" fox\tAnimals\n'
    parti_prompts = {"PartiPrompts.tsv": table, "README.md": b""}
    drawbench = {"data/train-00000-of-00001-a.parquet": parquet(Prompts=["a fox"], Category=["x"])}
    serve({"nateraw/parti-prompts": parti_prompts, "sayakpaul/drawbench": drawbench})
    assert texts("partiprompts") == ['a "red" fox']
    assert texts("drawbench") == ["a fox"]


def test_a_split_may_be_all_tables_of_its_repository(serve):
    files = {
        "data/train-00000-of-00002.parquet": parquet(Prompts=["a fox"]),
        "data/train-00001-of-00002.parquet": parquet(Prompts=["a hare", "an owl"]),
    }
    serve({"sayakpaul/drawbench": files})
    assert texts("drawbench") == ["a fox", "a hare", "an owl"]


def test_of_several_tables_none_is_taken_for_a_split_that_they_do_not_name(serve):
    files = {"a.parquet": parquet(Prompts=["a"]), "b.parquet": parquet(Prompts=["b"])}
    serve({"sayakpaul/drawbench": files})
    with pytest.raises(ValueError, match="it has no table of the split train"):
        load_prompts("drawbench")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pickapic", "RepositoryNotFoundError"),
        ("hpdv2", "RepositoryNotFoundError"),
        ("partiprompts", "no column Prompt"),
    ],
)
def test_a_set_that_nobody_has_is_refused_with_the_local_way_in_one_sentence(serve, name, reason):
    serve({"nateraw/parti-prompts": {"other.parquet": parquet(text=["a"])}})
    with pytest.raises(ValueError) as error:
        load_prompts(name)
    message = str(error.value)
    assert "\n" not in message
    assert f"the prompt set {name} could not be read" in message
    assert reason in message
    assert "give prompts=<that file>" in message


def test_a_limit_is_spread_over_the_list_and_changes_no_id():
    distinct = [f"prompt {i}" for i in range(10)]
    assert texts(distinct, 4) == [f"prompt {i}" for i in (0, 2, 5, 7)]

    repeated = [f"prompt {i % 7}" for i in range(10)]
    assert set(load_prompts(repeated, 3)) < set(load_prompts(repeated))
    assert load_prompts(["a"], 9) == load_prompts(["a"])
