"""ImageReward against an independent evaluation of a tiny one in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deradiff.scorers import check_scorer, load_scorer
from deradiff.scorers.imagereward import ImageRewardScorer
from tests.support import tiny_blip, tiny_clip
from tests.support.scorer_images import CROPPED_IMAGES as IMAGES
from tests.support.scorer_images import LONG_PROMPTS as PROMPTS
from tests.support.scorer_images import assert_close, assert_refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(tiny_blip.state_dict(), folder / "ImageReward.pt")
    tiny_blip.write_tokenizer(folder / "bert")
    return folder


def load_imagereward(folder: Path) -> Any:
    return load_scorer("imagereward", str(folder / "ImageReward.pt"), str(folder / "bert"))


def expected_rewards() -> Tensor:
    """Rewards (N,) of the shared images and prompts by the independent evaluation."""
    network = tiny_blip.Network(tiny_blip.state_dict())
    rewards = []
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        rewards.append(network.reward(tiny_blip.centred(image), tiny_blip.tokens(prompt)))
    return torch.tensor(rewards).float()


def test_it_scores_as_an_independent_evaluation(folder: Path) -> None:
    scorer = load_imagereward(folder)
    expected = expected_rewards()
    assert_close(scorer(IMAGES, PROMPTS), expected)
    assert expected.std() > 0.1

    assert scorer.name == "imagereward"
    assert scorer.scale == "standardised reward"
    assert str(tiny_blip.SIDE) in scorer.preprocessing


def test_both_the_image_and_the_prompt_matter(folder: Path) -> None:
    scorer = load_imagereward(folder)
    of_one_image = scorer(IMAGES[:1] * 2, PROMPTS[:2])
    of_one_prompt = scorer(IMAGES[:2], PROMPTS[:1] * 2)
    assert (of_one_image[0] - of_one_image[1]).abs() > 1e-3
    assert (of_one_prompt[0] - of_one_prompt[1]).abs() > 1e-3


def test_a_reward_does_not_depend_on_its_neighbours(folder: Path) -> None:
    scorer = load_imagereward(folder)
    pairs = zip(IMAGES, PROMPTS, strict=True)
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in pairs])
    assert_close(alone, scorer(IMAGES, PROMPTS))


def test_other_weights_are_another_version(folder: Path, tmp_path: Path) -> None:
    torch.save(tiny_blip.state_dict(1), tmp_path / "ImageReward.pt")
    other = load_scorer("imagereward", str(tmp_path / "ImageReward.pt"), str(folder / "bert"))
    version = load_imagereward(folder).version
    assert version != other.version
    assert version == load_imagereward(folder).version
    assert len(version) == len(other.version) == 12


@pytest.fixture
def refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asserts that a checkpoint is refused with these words, before its weights are loaded."""

    def fail(*arguments: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(ImageRewardScorer, "__init__", fail)

    def assert_imagereward_refused(words: str, **settings: Any) -> None:
        paths = {"checkpoint": folder / "ImageReward.pt", "tokenizer": folder / "bert"} | settings
        arguments = {name: str(path) for name, path in paths.items() if path is not None}
        assert_refused(words, "imagereward", **arguments)

    return assert_imagereward_refused


def test_state_dicts_of_another_layout_are_refused(refused: Any, tmp_path: Path) -> None:
    state = tiny_blip.state_dict()
    lost = "blip.visual_encoder.norm.bias"
    less = {name: tensor for name, tensor in state.items() if name != lost}
    more = state | {"blip.text_encoder.pooler.dense.weight": torch.zeros(2)}
    cases = (
        (less, r"vision.post_layernorm.bias is nothing there, not \[128\]"),
        (more, r"text.pooler.dense.weight is \[2\] there, not nothing"),
        (tiny_clip.open_clip_state(), "is not ImageReward's state dict: it holds no"),
    )
    file = tmp_path / "other.pt"
    for other, words in cases:
        torch.save(other, file)
        refused(words, checkpoint=file)


def test_files_of_another_kind_are_refused(refused: Any, folder: Path, tmp_path: Path) -> None:
    refused("is a folder: give ImageReward's file", checkpoint=folder / "bert")
    refused("holds no BERT tokenizer", tokenizer=tmp_path)
    refused("tokenizer was wanted from the hub", tokenizer=None)
    refused("imagereward has no model_config", tokenizer=None, model_config="x.json")


def test_a_tokenizer_of_another_network_is_refused(refused: Any, tmp_path: Path) -> None:
    longer = tiny_blip.write_tokenizer(tmp_path / "longer")
    words = [*tiny_blip.VOCABULARY, *[f"w{i}" for i in range(9)]]
    (longer / "vocab.txt").write_text("\n".join(words) + "\n")
    refused("tokens and .* knows", tokenizer=longer)


def test_the_published_files_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, str]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        requests.extend((repo, pattern) for pattern in allow_patterns)
        is_tokenizer = repo == "google-bert/bert-base-uncased"
        return str(folder / "bert" if is_tokenizer else folder)

    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", snapshot_download)
    check_scorer("imagereward")
    weights = (".pt", ".pth", ".bin", ".safetensors")
    assert not any(pattern.endswith(weights) for _, pattern in requests)

    assert_close(load_scorer("imagereward")(IMAGES, PROMPTS), expected_rewards())
    assert ("THUDM/ImageReward", "ImageReward.pt") in requests
