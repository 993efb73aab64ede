"""The aesthetic predictor against an independent evaluation of a tiny one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deradiff.scorers import check_scorer, load_scorer
from tests.support import tiny_blip, tiny_clip
from tests.support.scorer_images import CROPPED_IMAGES as IMAGES
from tests.support.scorer_images import LONG_PROMPTS as PROMPTS
from tests.support.scorer_images import assert_close, assert_refused

PUBLISHED_HEAD = "sac+logos+ava1-l14-linearMSE.pth"


def make_head(seed: int = 0) -> dict[str, Tensor]:
    return tiny_blip.head_state(tiny_clip.EMBED, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower, and one linear chain in two formats."""
    folder = tmp_path_factory.mktemp("aesthetic")
    model = tiny_clip.huggingface_model(activation="quick_gelu")
    tiny_clip.write_huggingface(folder / "tower", model)
    torch.save(make_head(), folder / "head.pth")
    save_file(make_head(), folder / "head.safetensors")
    return folder


def load_aesthetic(folder: Path, head: str = "head.pth") -> Any:
    return load_scorer("aesthetic", str(folder / "tower"), head=str(folder / head))


@pytest.mark.parametrize("head", ["head.pth", "head.safetensors"])
def test_it_scores_as_an_independent_evaluation(folder: Path, head: str) -> None:
    state = tiny_clip.under_open_clip_names(tiny_clip.huggingface_model())
    tower = tiny_clip.Network(state, tiny_clip.quick_gelu)
    vectors = torch.stack([tower.image(tiny_blip.centred(image)) for image in IMAGES])
    unit_vectors = vectors / vectors.norm(dim=1, keepdim=True)
    expected = tiny_blip.chain(make_head(), unit_vectors).float()
    assert expected.std() > 0.05

    scorer = load_aesthetic(folder, head)
    scores = scorer(IMAGES, PROMPTS)
    assert_close(scores, expected)
    assert torch.equal(scores, scorer(IMAGES, [""] * len(IMAGES)))

    assert scorer.name == "aesthetic"
    assert scorer.scale == "rating, about 1 to 10"
    assert "prompt is not read" in scorer.preprocessing


def test_another_head_is_another_version(folder: Path, tmp_path: Path) -> None:
    torch.save(make_head(seed=1), tmp_path / "head.pth")
    other = load_scorer("aesthetic", str(folder / "tower"), head=str(tmp_path / "head.pth"))
    version = load_aesthetic(folder).version
    assert version != other.version
    assert version == load_aesthetic(folder).version
    assert len(version) == len(other.version) == 12


def test_heads_of_another_kind_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head = make_head()
    with_relu = {name.replace("layers.2", "layers.3"): tensor for name, tensor in head.items()}
    wide = head | {"layers.0.weight": torch.zeros(1024, 768)}
    linear = {"weight": torch.zeros(1, 20)}
    cases = (
        (with_relu, r"layers.2.bias is nothing there, not \[128\]"),
        (wide, r"\[1024, 768\] there, not \[1024, 20\]"),
        (linear, "is not the aesthetic predictor's linear chain"),
    )
    file = tmp_path / "other.pth"
    tower = str(folder / "tower")
    for state, words in cases:
        torch.save(state, file)
        assert_refused(words, "aesthetic", checkpoint=tower, head=str(file))

    missing = str(tmp_path / "none.pth")
    assert_refused("there is no checkpoint .*none.pth", "aesthetic", checkpoint=tower, head=missing)
    right = str(folder / "head.pth")
    assert_refused("clip has no head: leave out head", "clip", checkpoint=tower, head=right)


def test_the_published_files_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, str]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        requests.extend((repo, pattern) for pattern in allow_patterns)
        is_tower = repo == "openai/clip-vit-large-patch14"
        return str(folder / "tower" if is_tower else folder)

    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", snapshot_download)
    check_scorer("aesthetic")
    weights = (".pt", ".pth", ".bin", ".safetensors")
    assert not any(pattern.endswith(weights) for _, pattern in requests)

    (folder / PUBLISHED_HEAD).write_bytes((folder / "head.pth").read_bytes())
    scores = load_scorer("aesthetic")(IMAGES, PROMPTS)
    assert torch.equal(scores, load_aesthetic(folder)(IMAGES, PROMPTS))
    assert ("camenduru/improved-aesthetic-predictor", PUBLISHED_HEAD) in requests
