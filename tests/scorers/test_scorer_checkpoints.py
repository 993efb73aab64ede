"""What a user may get wrong about a CLIP checkpoint.

It is said in one sentence, by the quick check and by loading alike, before a weight is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deradiff.scorers import check_scorer, checkpoints, load_scorer, open_clip
from tests.support import tiny_clip
from tests.support.scorer_images import assert_refused
from tests.support.tiny_clip import MODEL_CONFIG

# Files of the fixture's folder
HPS = Path("hps.pt")
TOKENIZER = Path("tokenizer")
CONFIG = Path("model.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip state dict, its tokenizer and config, and two Hugging Face folders.

    `hf` is whole; `bare` has neither tokenizer nor image processor.
    """
    folder = tmp_path_factory.mktemp("scorers")
    tiny_clip.write_state(folder / HPS, tiny_clip.open_clip_state())
    tiny_clip.write_tokenizer(folder / TOKENIZER)
    tiny_clip.write_config(folder / CONFIG, MODEL_CONFIG)
    tiny_clip.write_huggingface(folder / "hf", tiny_clip.huggingface_model())
    tiny_clip.write_huggingface(
        folder / "bare", tiny_clip.huggingface_model(), tokenizer=False, processor=False
    )
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test fails where the weights of a network are loaded."""

    def fail(checkpoint: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(checkpoints.Checkpoint, "load", fail)


@pytest.fixture
def refused(folder: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asserts that both ways refuse with these words; a `Path` is one of the fixture's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def assert_refused_in_folder(words: str, name: str, *paths: str | Path | None) -> None:
        files = [folder / path if isinstance(path, Path) else path for path in paths]
        assert_refused(words, name, *files)

    return assert_refused_in_folder


def test_the_check_passes_what_can_be_loaded(folder: Path, no_network: None) -> None:
    check_scorer("vivid")
    check_scorer("pickscore", str(folder / "hf"))
    check_scorer("pickscore", str(folder / "bare"), str(folder / TOKENIZER))
    check_scorer("hpsv2", str(folder / HPS), str(folder / TOKENIZER), str(folder / CONFIG))


# Where a checkpoint lies


def test_missing_checkpoints(refused: Any, tmp_path: Path) -> None:
    refused("there is no checkpoint .*none.pt", "hpsv2", Path("none.pt"))
    refused("there is no checkpoint weights/none.pt", "hpsv2", "weights/none.pt")
    refused("there is no checkpoint runs/none", "clip", "runs/none")
    refused("wanted from the hub, org/name, which did not answer", "clip", "org/name")

    # Nobody named the tokenizer
    refused("tokenizer was wanted from the hub, laion", "hpsv2", HPS, None, CONFIG)

    archive = tmp_path / "weights.zip"
    archive.write_bytes(b"")
    endings = "must be a folder, or a .pt, .pth, .bin or .safetensors file"
    refused(endings, "clip", str(archive))


def test_folders_of_another_kind(refused: Any, tmp_path: Path) -> None:
    refused("is no CLIPModel folder", "clip", TOKENIZER)
    tiny_clip.write_config(tmp_path / "config.json", {"model_type": "siglip"})
    refused("config.json of model_type clip", "clip", str(tmp_path))
    refused("remove model_config", "clip", Path("hf"), None, CONFIG)

    tiny_clip.huggingface_model().config.save_pretrained(tmp_path)
    refused("holds no model.safetensors or pytorch_model.bin", "clip", str(tmp_path), TOKENIZER)
    refused("tokenizer was wanted from the hub", "clip", Path("bare"))
    refused("holds no CLIP tokenizer", "clip", Path("bare"), Path("bare"))


# What a weight file holds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"visual.proj": None},
            r"visual_projection.weight is nothing there, not \[20, 48\]$",
        ),
        (
            {"visual.proj": torch.zeros(48, 19)},
            r"visual_projection.weight is \[19, 48\] there, not \[20, 48\]$",
        ),
        ({"visual.extra": torch.zeros(2)}, r"visual.extra is \[2\] there, not nothing"),
    ],
)
def test_state_dicts_of_another_size(
    refused: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    state = tiny_clip.open_clip_state() | change
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    file = tiny_clip.write_state(tmp_path / "changed.pt", state)
    refused(words, "hpsv2", str(file), TOKENIZER, CONFIG)


def test_state_dicts_of_another_layout(refused: Any, tmp_path: Path) -> None:
    of_another_model = r"is not an open_clip state dict of that model \(set model_config=\)"
    refused(of_another_model, "hpsv2", HPS, TOKENIZER)
    weights = Path("hf/model.safetensors")
    refused("is not an open_clip state dict", "clip", weights, TOKENIZER, CONFIG)

    # An open_clip state dict in a Hugging Face folder
    other = tiny_clip.write_huggingface(tmp_path / "hf", tiny_clip.huggingface_model())
    save_file(tiny_clip.open_clip_state(), other / "model.safetensors")
    refused("is not the CLIPModel of its config.json", "clip", str(other))


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {"a": 1}}])
def test_files_that_are_no_state_dict(refused: Any, tmp_path: Path, content: Any) -> None:
    file = tmp_path / "strange.pt"
    torch.save(content, file)
    refused("is no state dict", "clip", str(file), TOKENIZER, CONFIG)


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_files_that_hold_no_tensors(refused: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"not tensors at all")
    refused("holds no plain tensors", "clip", str(file), TOKENIZER, CONFIG)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_executed(refused: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = {"state_dict": tiny_clip.open_clip_state(), "trap": Trap(str(trace))}
    file = tmp_path / "trap.pt"
    torch.save(content, file)
    refused("deradiff unpickles nothing else", "hpsv2", str(file), TOKENIZER, CONFIG)
    assert not trace.exists()


# Model configs and tokenizers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": None}, "has no vision_cfg"),
        ({"embed_dim": None}, "has no embed_dim"),
        (
            {"text_cfg": {"width": 32, "layers": 2, "vocab_size": 514, "context_length": 24}},
            "has no heads",
        ),
        ({"vision_cfg": {"timm_model_name": "vit"}}, "sets timm_model_name"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 48}}, "describes a ResNet"),
        ({"custom_text": True}, "sets custom_text"),
        ({"text_cfg": {**MODEL_CONFIG["text_cfg"], "no_causal_mask": True}}, "sets no_causal_mask"),
    ],
)
def test_model_configs_of_other_networks(
    refused: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    changed = MODEL_CONFIG | change
    config = {key: value for key, value in changed.items() if value is not None}
    file = tiny_clip.write_config(tmp_path / "model.json", config)
    refused(words, "hpsv2", HPS, TOKENIZER, str(file))


def test_model_configs_that_cannot_be_read(refused: Any, tmp_path: Path) -> None:
    refused("is no readable json file", "hpsv2", HPS, TOKENIZER, "none.json")
    file = tmp_path / "model.json"
    file.write_text("{")
    refused("is no readable json file", "hpsv2", HPS, TOKENIZER, str(file))


def test_a_tokenizer_of_another_network(refused: Any, tmp_path: Path) -> None:
    text = MODEL_CONFIG["text_cfg"] | {"vocab_size": 100}
    file = tiny_clip.write_config(tmp_path / "model.json", MODEL_CONFIG | {"text_cfg": text})
    refused("514 tokens and .* knows 100", "hpsv2", HPS, TOKENIZER, str(file))


def test_an_end_marker_that_the_network_does_not_know_is_warned_of(tmp_path: Path) -> None:
    """transformers then reads the text at its first token, which is the same for every prompt."""
    tiny_clip.write_huggingface(tmp_path, tiny_clip.huggingface_model(eos_token_id=49407))
    with pytest.warns(UserWarning, match="ignore the prompt"):
        check_scorer("clip", str(tmp_path))


# The hub


HPS_FILES = {
    "hpsv2": ("HPS_v2_compressed.pt", 2),
    "hpsv2.1": ("HPS_v2.1_compressed.pt", 21),
}
"""The published file of each, and the seed of the tiny one in its place."""


@pytest.fixture
def hub_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Three tiny repositories in place of the hub's.

    Returns:
        Repository and file pattern of every request, as they come.
    """
    tiny_clip.write_huggingface(
        tmp_path / "yuvalkirstain" / "PickScore_v1", tiny_clip.huggingface_model(), tokenizer=False
    )
    tiny_clip.write_tokenizer(tmp_path / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    hps_folder = tmp_path / "xswu" / "HPSv2"
    hps_folder.mkdir(parents=True)
    for file, seed in HPS_FILES.values():
        tiny_clip.write_state(hps_folder / file, tiny_clip.open_clip_state(seed))

    requests: list[tuple[str, str]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        requests.extend((repo, pattern) for pattern in allow_patterns)
        return str(tmp_path / repo)

    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", snapshot_download)
    monkeypatch.setattr(open_clip, "VIT_H_14", MODEL_CONFIG)
    return requests


def test_the_check_asks_the_hub_for_no_weights(hub_requests: list[tuple[str, str]]) -> None:
    for name in ("pickscore", "hpsv2", "hpsv2.1"):
        check_scorer(name)
    assert hub_requests
    assert not any(pattern.endswith((".pt", ".bin", ".safetensors")) for _, pattern in hub_requests)


def test_pickscore_comes_from_the_hub(hub_requests: list[tuple[str, str]]) -> None:
    image = Image.new("RGB", (40, 30), "red")
    scorer: Any = load_scorer("pickscore")
    network = tiny_clip.Network(tiny_clip.under_open_clip_names(tiny_clip.huggingface_model()))
    cosine = network.cosine(tiny_clip.cropped(image), tiny_clip.tokens("a fox"))
    score = scorer([image], ["a fox"]).item()
    assert score / scorer.factor == pytest.approx(cosine, abs=1e-5)
    assert ("yuvalkirstain/PickScore_v1", "model.safetensors") in hub_requests


@pytest.mark.parametrize("name", list(HPS_FILES))
def test_hpsv2_comes_from_the_hub(hub_requests: list[tuple[str, str]], name: str) -> None:
    file, seed = HPS_FILES[name]
    image = Image.new("RGB", (40, 30), "red")
    network = tiny_clip.Network(tiny_clip.open_clip_state(seed))
    cosine = network.cosine(tiny_clip.letterboxed(image), tiny_clip.tokens("a fox"))
    assert load_scorer(name)([image], ["a fox"]).item() == pytest.approx(cosine, abs=1e-5)
    assert ("xswu/HPSv2", file) in hub_requests
