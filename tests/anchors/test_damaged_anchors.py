"""Anchors that are damaged, or were made to do harm: each is refused by name, in one sentence and
in a moment."""

import copy
import functools
import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from deradiff.anchors.anchor import CARD, LORA_FILE, AnchorCard, load_anchor, save_anchor
from deradiff.anchors.locations import PEFT_CONFIG
from deradiff.anchors.lora_files import PEFT_FILE
from deradiff.realignment.bake import bake
from deradiff.realignment.context import realign
from tests.support.anchor_files import denoiser_of
from tests.support.realign_world import BASES
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_lora

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"


@functools.cache
def template(method):
    """The files of an anchor, by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_anchor(Path(folder), method)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return {file.relative_to(folder): file.read_bytes() for file in files}


def saved_anchor(folder, method="lora"):
    for name, content in template(method).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_anchor(folder, method):
    denoiser = denoiser_of("sd15")
    if method == "peft":
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"])
        get_peft_model(copy.deepcopy(denoiser), config).save_pretrained(folder)
        return
    network = tiny_lora(denoiser) if method == "lora" else perturbed_denoiser(denoiser)
    card = AnchorCard(base_model="tiny", family="sd15", method=method, beta=2000)
    save_anchor(folder, network, card)
    # A damaged file with a digest is refused by it alone.
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({k: card[k] for k in card if "digest" not in k}))


def peft_anchor(folder, **changes):
    """A LoRA in peft's own files, with changes to its config."""
    saved_anchor(folder, "peft")
    settings = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(settings | changes))
    return folder


def refusal_of(anchor):
    """What is said of an anchor, which is refused within a moment and leaves nothing behind."""
    start = time.monotonic()
    with pytest.raises(ValueError) as refused:
        load_anchor(anchor)
        pipe = copy.deepcopy(BASES["sd15"])
        before = list(pipe.unet.state_dict())
        try:
            with realign(pipe, anchor, 1):
                pass
        finally:
            assert list(pipe.unet.state_dict()) == before
    assert time.monotonic() - start < 10
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_lora_of_values_that_no_network_has_is_refused(tmp_path, value, part):
    file = saved_anchor(tmp_path) / LORA_FILE
    state = load_file(file)
    key = next(key for key in state if part in key)
    state[key].flatten()[1] = value
    save_file(state, file)
    assert key in refusal_of(tmp_path)


@pytest.mark.parametrize("in_one_file", [False, True])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_a_network_of_values_that_no_network_has_is_refused(
    tmp_path, base_folder, value, in_one_file
):
    network = perturbed_denoiser(denoiser_of("sd15"))
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] = value
    if in_one_file:
        anchor = tmp_path / "network.safetensors"
        save_file({key: v.contiguous() for key, v in network.state_dict().items()}, anchor)
    else:
        anchor = tmp_path
        network.save_pretrained(tmp_path / "unet")
    assert "conv_in.weight" in refusal_of(anchor)
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        bake(anchor, 0.5, tmp_path / "baked", base=str(base_folder))


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 2**33])
def test_a_header_that_is_longer_than_the_file_is_refused(tmp_path, length):
    file = saved_anchor(tmp_path) / LORA_FILE
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    assert LORA_FILE in refusal_of(tmp_path)
    assert LORA_FILE in refusal_of(file)


# The config of a LoRA

ENDLESS = {
    "(a+)+$": 4,
    "(.*)*x": 4,
    "(a|a)*b": 4,
    ".*.*.*.*.*x": 4,
    r"(.+)\1+": 4,
    "a{1000}{1000}": 4,
    "(?=(a+))b": 4,
    "x" * 10_000: 4,
    "(": 4,
    "[": 4,
}


@pytest.mark.parametrize("setting", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("key", [key for key in ENDLESS if not key.isalpha()])
def test_an_expression_that_may_never_end_is_refused(tmp_path, setting, key):
    message = refusal_of(peft_anchor(tmp_path, **{setting: {key: 4}}))
    assert f"{setting} of its config" in message


def test_thousands_of_patterns_take_no_time(tmp_path):
    literal = {f"down_blocks.{i}.to_q": 4 for i in range(100_000)}
    anchor = peft_anchor(tmp_path, alpha_pattern=literal)
    start = time.monotonic()
    load_anchor(anchor).lora(BASES["sd15"])
    assert time.monotonic() - start < 5
    many = {f"down.*{i}": 4 for i in range(1000)}
    assert "regular expressions" in refusal_of(peft_anchor(tmp_path, alpha_pattern=many))


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": 0},
        {"r": -4},
        {"r": 8},
        {"r": "4"},
        {"r": True},
        {"r": [4]},
        {"r": 10**400},
        {"rank_pattern": {"to_q": 10**9}},
        {"rank_pattern": ["to_q"]},
        {"rank_pattern": 3},
        {"lora_alpha": 1e38},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": "4"},
        {"lora_alpha": True},
        {"lora_alpha": {}},
        {"alpha_pattern": {"to_q": 1e300}},
        {"alpha_pattern": {"to_q": None}},
        {"alpha_pattern": "to_q"},
        {"use_rslora": "false"},
        {"use_dora": 1},
        {"peft_type": ["LORA"]},
        {"bias": {"a": 1}},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_a_config_that_means_no_lora_is_refused(tmp_path, changes):
    assert str(tmp_path) in refusal_of(peft_anchor(tmp_path, **changes))


@pytest.mark.parametrize("settings", ["[]", "3", "null", "[" * 100_000, "{", '{"r": []}'])
def test_a_header_that_holds_no_config_does_no_harm(tmp_path, settings):
    """It is as if there were none, or refused."""
    file = saved_anchor(tmp_path) / LORA_FILE
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": settings})
    try:
        load_anchor(tmp_path).lora(BASES["sd15"])
    except ValueError as error:
        assert str(tmp_path) in str(error)


# Cards

NO_CARDS = [
    "[]",
    "null",
    "3",
    '"card"',
    "",
    "{",
    "[" * 100_000,
    '{"a":' * 100_000,
    POINTER,
    "\ufeff",
]


@pytest.mark.parametrize("text", NO_CARDS, ids=lambda text: text[:10])
def test_what_is_no_card_is_refused_by_the_name_of_the_file(tmp_path, text):
    saved_anchor(tmp_path)
    (tmp_path / CARD).write_text(text, encoding="utf-8")
    assert CARD in refusal_of(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b"\x80", bytes(range(256))])
def test_a_card_that_is_no_text_is_refused(tmp_path, content):
    saved_anchor(tmp_path)
    (tmp_path / CARD).write_bytes(content)
    assert CARD in refusal_of(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        '"beta": Infinity',
        '"beta": NaN',
        '"beta": true',
        '"beta": "2000"',
        '"beta": 0',
        '"beta": 1' + "0" * 400,
        '"beta": 1' + "0" * 10_000,
        '"beta": [1]',
        '"steps": -1',
        '"steps": "many"',
        '"flops": Infinity',
        '"gpu_hours": null',
        '"base_model": 3',
        '"base_model": ""',
        '"family": ["sd15"]',
        '"family": null',
        '"method": "dora"',
        '"versions": ["torch"]',
        '"versions": {"torch": 2}',
        '"reward": {"clip": "much"}',
        '"device": {"a": 1}',
        '"weights_digest": 3',
        '"vae": []',
    ],
    ids=lambda change: change[:25],
)
def test_a_card_of_other_types_is_refused(tmp_path, change):
    text = (saved_anchor(tmp_path) / CARD).read_text()
    (tmp_path / CARD).write_text(text.rstrip().removesuffix("}") + f", {change}}}")
    message = refusal_of(tmp_path)
    assert CARD in message
    key = change.split('"')[1]
    assert key in message or "no JSON" in message


@pytest.mark.parametrize("name", ["config.json", PEFT_CONFIG, LORA_FILE])
def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path, name):
    method = "full" if name == "config.json" else "lora"
    if name == PEFT_CONFIG:
        folder = peft_anchor(tmp_path)
    else:
        folder = saved_anchor(tmp_path, method)
    file = folder / "unet" / name if method == "full" else folder / name
    file.write_text(POINTER)
    message = refusal_of(tmp_path)
    assert "git lfs pull" in message
    assert name in message


def test_a_lora_of_half_a_pair_is_refused(tmp_path):
    file = peft_anchor(tmp_path) / PEFT_FILE
    state = load_file(file)
    key = next(key for key in state if "lora_A" in key)
    save_file({name: value for name, value in state.items() if name != key}, file)
    assert str(tmp_path) in refusal_of(tmp_path)
