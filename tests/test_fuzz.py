"""Files of strangers at random: every reader reads one, or names it in one sentence.

`FUZZ_EXAMPLES` says how many files of each kind are tried.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.anchors.anchor import CARD, load_anchor
from deradiff.anchors.locations import PEFT_CONFIG
from deradiff.anchors.lora_files import check_config
from deradiff.data.prompts import load_prompts
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.evaluation.manifest import MANIFEST, read_manifest
from deradiff.image_files import UnreadableImage, decode_image
from deradiff.image_tables import encode_png, image_of_cell
from deradiff.scorers import cache
from deradiff.training.meters import MetricsFile
from tests.support.sampled_runs import write_run

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")
fuzzed = hypothesis.settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "25")),
    deadline=None,
    database=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(hypothesis.HealthCheck),
)

NUMBERS = [0, -1, 1e38, 1e308, 10**400, -(10**400), 2**63, 2**64, float("nan"), float("inf")]
TEXTS = ["", "../../x", "/etc/passwd", "\x1b[2J", "\ud800", "a\u2028b", "\x00", "x" * 5000]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
DEEP = [opening * 100_000 for opening in ("[", '{"a":')]


def records(keys):
    """Changes to a record of these keys: other values, and keys of nobody."""
    return st.dictionaries(st.sampled_from(sorted(keys)) | st.text(max_size=8), values, max_size=3)


def damaged(content):
    """What can become of a file: cut, other bytes in it, or something else altogether."""
    flips = st.lists(st.tuples(st.integers(0, max(0, len(content) - 1)), st.integers(0, 255)))

    def apply(cut, changes):
        data = bytearray(content)
        for place, byte in changes:
            data[place] = byte
        return bytes(data[:cut])

    return st.builds(apply, st.integers(0, len(content)), flips) | st.binary(max_size=200)


def assert_read_or_named(read, name):
    """Assert that a reader returns, or raises ValueError in a sentence that names the file."""
    try:
        return read()
    except ValueError as error:
        message = str(error)
        assert type(error) in (ValueError, UnreadableImage), repr(error)
        assert name in message
        assert "\n" not in message
        assert len(message) < 2000
        return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A sample run with its anchor."""
    return Path(write_run(tmp_path_factory.mktemp("runs"), 2000.0, prompts=1, seeds=1))


@pytest.fixture(scope="module")
def line(run):
    return (run / MANIFEST).read_text().split("\n")[0]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@fuzzed
@given(data=st.data())
def test_manifests(data, line, folder):
    whole = json.loads(line)
    text = data.draw(
        records(whole).map(lambda changes: json.dumps(whole | changes))
        | st.sampled_from([*DEEP, '{"a": ' + "9" * 5000 + "}"])
    )
    content = data.draw(st.just(text.encode()) | damaged(line.encode()))
    (folder / MANIFEST).write_bytes(content)
    lines = assert_read_or_named(lambda: read_manifest(str(folder)), MANIFEST)
    for record in lines or []:
        assert np.isfinite(float(record["lam"]))


@fuzzed
@given(data=st.data())
def test_cards(data, run, folder):
    card = next(run.parents[1].rglob(CARD), None) or next(run.parent.rglob(CARD))
    whole = json.loads(card.read_text())
    whole.pop("digest", None)
    changed = records(whole).map(lambda changes: json.dumps(whole | changes).encode())
    content = changed | damaged(card.read_bytes()) | st.sampled_from([t.encode() for t in DEEP])
    (folder / CARD).write_bytes(data.draw(content))
    (folder / "pytorch_lora_weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    anchor = assert_read_or_named(lambda: load_anchor(folder), str(folder))
    if anchor is not None and anchor.card.beta is not None:
        assert 0 < float(anchor.card.beta) < np.inf


CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "target_modules": ["to_q"],
}


@fuzzed
@given(data=st.data())
def test_configs_of_adapters(data, folder):
    changed = records(CONFIG).map(lambda changes: json.dumps(CONFIG | changes).encode())
    content = changed | damaged(json.dumps(CONFIG).encode())
    (folder / PEFT_CONFIG).write_bytes(data.draw(content))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    anchor = assert_read_or_named(lambda: load_anchor(folder), str(folder))
    if anchor is not None:
        check_config(anchor.peft, "the anchor")


ENDINGS = ["txt", "jsonl", "ndjson", "json", "yaml", "yml", "csv", "tsv", "parquet", "JSONL", ""]


@fuzzed
@given(
    ending=st.sampled_from(ENDINGS),
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | values.map(lambda value: json.dumps(value).encode())
    | st.lists(st.fixed_dictionaries({"prompt": values})).map(lambda v: json.dumps(v).encode())
    | st.lists(scalars).map(lambda v: ("prompt\n" + "\n".join(map(repr, v))).encode())
    | st.sampled_from([t.encode() for t in DEEP[:1]] + [b"a: &a [*a]", b"? [a]\n: b"]),
)
def test_prompt_files(folder, ending, content):
    # YAML's reader needs seconds for what is nested so deep.
    hypothesis.assume(len(content) < 10_000 or not ending.startswith("y"))
    file = folder / f"prompts.{ending}"
    file.write_bytes(content)
    for prompt in assert_read_or_named(lambda: load_prompts(str(file)), "prompts.") or []:
        assert prompt.text.strip()
        assert (folder / prompt.prompt_id).parent == folder


@fuzzed
@given(
    lines=st.lists(
        st.binary(max_size=30)
        | values.map(lambda value: json.dumps(value).encode())
        | st.builds(lambda step: json.dumps({"step": step}).encode(), scalars)
        | st.sampled_from([text.encode() for text in DEEP])
    )
)
def test_metrics_and_score_caches(folder, lines):
    file = folder / "metrics.jsonl"
    file.write_bytes(b"\n".join(lines))
    MetricsFile(file, 3)
    for line in file.read_bytes().split(b"\n")[:-1]:
        assert json.loads(line)["step"] <= 3
    for line in lines:
        cache._parse(line)


@fuzzed
@given(data=st.data())
def test_reference_errors(data, folder):
    pairs = [(0, 1), (0, 2), (1, 1)]
    errors = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with tempfile.TemporaryDirectory() as root:
        store = ReferenceErrors(Path(root), "key")
        store.add(pairs, errors)
        store.flush()
        store.file.write_bytes(data.draw(damaged(store.file.read_bytes())))
        read = ReferenceErrors(Path(root), "key").get(pairs)
    assert bool(((read == errors) | read.isnan()).all())


PNG = encode_png(Image.radial_gradient("L").resize((9, 5)).convert("RGB"))


@fuzzed
@given(content=damaged(PNG), cell=values)
def test_images_and_cells(content, cell):
    for read in (lambda: decode_image(content), lambda: image_of_cell(cell)):
        try:
            assert read().mode == "RGB"
        except UnreadableImage as error:
            assert "\n" not in str(error)
