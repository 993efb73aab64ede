"""The aesthetic predictor and ImageReward against independent evaluations of tiny checkpoints in
the published layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deradiff.scorers import check_scorer, load_scorer
from deradiff.scorers.imagereward import ImageRewardScorer
from deradiff.scorers.preparation import centre_crop
from tests.scorers.test_scorers import IMAGES, PROMPTS, close, noise
from tests.support import tiny_blip, tiny_clip

# and sizes where half to even and rounding down are a pixel apart: 32 x 35 and 39 x 32 after
# resizing
CROPPED = [*IMAGES, noise((64, 70), 10), noise((39, 32), 11)]
WORDS = [*PROMPTS, "a red fox, in the snow & more", "R2D2's foxes " + "and foxes " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    tiny_clip.write_huggingface(
        folder / "tower", tiny_clip.huggingface_model(activation="quick_gelu")
    )
    head = tiny_blip.head_state(tiny_clip.EMBED, torch.Generator().manual_seed(0))
    torch.save(head, folder / "head.pth")
    save_file(head, folder / "head.safetensors")
    torch.save(tiny_blip.state_dict(), folder / "ImageReward.pt")
    tiny_blip.write_tokenizer(folder / "bert")
    return folder


def aesthetic(folder: Path, head: str = "head.pth"):
    return load_scorer("aesthetic", str(folder / "tower"), head=str(folder / head))


def imagereward(folder: Path, file: str = "ImageReward.pt"):
    return load_scorer("imagereward", str(folder / file), str(folder / "bert"))


def rewards(state: dict[str, Tensor], images=CROPPED, prompts=WORDS) -> Tensor:
    network = tiny_blip.Network(state)
    return torch.tensor(
        [
            network.reward(tiny_blip.centred(i), tiny_blip.tokens(p))
            for i, p in zip(images, prompts, strict=True)
        ]
    ).float()


@pytest.mark.parametrize("head", ["head.pth", "head.safetensors"])
def test_the_aesthetic_predictor_scores_as_an_independent_evaluation(
    folder: Path, head: str
) -> None:
    tower = tiny_clip.Network(
        tiny_clip.under_open_clip_names(tiny_clip.huggingface_model()), tiny_clip.quick_gelu
    )
    state = torch.load(folder / "head.pth", weights_only=True)
    vectors = torch.stack([tower.image(tiny_blip.centred(image)) for image in CROPPED])
    wanted = tiny_blip.chain(state, vectors / vectors.norm(dim=1, keepdim=True)).float()
    scorer = aesthetic(folder, head)
    close(scorer(CROPPED, WORDS), wanted)
    assert wanted.std() > 0.05 and torch.equal(
        scorer(CROPPED, WORDS), scorer(CROPPED, [""] * len(CROPPED))
    )
    assert (scorer.name, scorer.scale) == (
        "aesthetic",
        "rating, about 1 to 10",
    ) and "prompt is not read" in scorer.preprocessing


def test_imagereward_scores_as_an_independent_evaluation(folder: Path) -> None:
    scorer, wanted = imagereward(folder), rewards(tiny_blip.state_dict())
    close(scorer(CROPPED, WORDS), wanted)
    assert wanted.std() > 0.1  # and both what it sees and what it reads matter:
    assert (
        scorer(CROPPED[:1] * 2, WORDS[:2])[0] - scorer(CROPPED[:1] * 2, WORDS[:2])[1]
    ).abs() > 1e-3
    assert (
        scorer(CROPPED[:2], WORDS[:1] * 2)[0] - scorer(CROPPED[:2], WORDS[:1] * 2)[1]
    ).abs() > 1e-3
    assert (scorer.name, scorer.scale) == ("imagereward", "standardised reward") and str(
        tiny_blip.SIDE
    ) in scorer.preprocessing


def test_a_reward_does_not_depend_on_its_neighbours(folder: Path) -> None:
    scorer = imagereward(folder)
    close(
        torch.cat([scorer([i], [p]) for i, p in zip(CROPPED, WORDS, strict=True)]),
        scorer(CROPPED, WORDS),
    )


def test_the_crop_is_torchvisions() -> None:
    for size in [(64, 70), (39, 32), (32, 37), (33, 32), (20, 13), (90, 50), (32, 32)]:
        image = noise(size)
        pixels = (
            centre_crop(image, 32).double().numpy()
            - tiny_clip.np.reshape(tiny_clip.MEAN, (3, 1, 1))
        ) / tiny_clip.np.reshape(tiny_clip.DEVIATION, (3, 1, 1))
        assert abs(pixels - tiny_blip.centred(image)).max() < 1e-5, size


def test_versions_tell_every_part_apart(folder: Path, tmp_path: Path) -> None:
    versions = {aesthetic(folder).version, imagereward(folder).version}
    torch.save(
        tiny_blip.head_state(tiny_clip.EMBED, torch.Generator().manual_seed(1)),
        tmp_path / "head.pth",
    )
    versions.add(
        load_scorer("aesthetic", str(folder / "tower"), head=str(tmp_path / "head.pth")).version
    )
    torch.save(tiny_blip.state_dict(1), tmp_path / "ImageReward.pt")
    versions.add(
        load_scorer("imagereward", str(tmp_path / "ImageReward.pt"), str(folder / "bert")).version
    )
    assert len(versions) == 4 and all(len(version) == 12 for version in versions)
    assert aesthetic(folder).version in versions  # the same again


def refused(words: str, name: str, **settings: str) -> None:
    for call in (check_scorer, load_scorer):
        with pytest.raises(ValueError, match=words) as error:
            call(name, **settings)
        assert "\n" not in str(error.value)


def test_heads_of_another_kind_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    head, tower = torch.load(folder / "head.pth", weights_only=True), str(folder / "tower")
    relu = {name.replace("layers.2", "layers.3"): tensor for name, tensor in head.items()}
    for state, words in (
        (relu, r"layers.2.bias is nothing there, not \[128\]"),
        (
            head | {"layers.0.weight": torch.zeros(1024, 768)},
            r"\[1024, 768\] there, not \[1024, 20\]",
        ),
        ({"weight": torch.zeros(1, 20)}, "is not the aesthetic predictor's linear chain"),
    ):
        torch.save(state, tmp_path / "other.pth")
        refused(words, "aesthetic", checkpoint=tower, head=str(tmp_path / "other.pth"))
    refused(
        "there is no checkpoint .*none.pth",
        "aesthetic",
        checkpoint=tower,
        head=str(tmp_path / "none.pth"),
    )
    refused(
        "clip has no head: leave out head", "clip", checkpoint=tower, head=str(folder / "head.pth")
    )


def test_files_that_are_not_imagereward_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        ImageRewardScorer, "__init__", lambda *a: pytest.fail("weights were loaded")
    )
    state, bert = tiny_blip.state_dict(), str(folder / "bert")

    def other(state: dict[str, Tensor]) -> str:
        torch.save(state, tmp_path / "other.pt")
        return str(tmp_path / "other.pt")

    lost = {
        name: tensor for name, tensor in state.items() if name != "blip.visual_encoder.norm.bias"
    }
    refused(
        r"vision.post_layernorm.bias is nothing there, not \[128\]",
        "imagereward",
        checkpoint=other(lost),
        tokenizer=bert,
    )
    extra = state | {"blip.text_encoder.pooler.dense.weight": torch.zeros(2)}
    refused(
        r"text.pooler.dense.weight is \[2\] there, not nothing",
        "imagereward",
        checkpoint=other(extra),
        tokenizer=bert,
    )
    refused(
        "is not ImageReward's state dict: it holds no",
        "imagereward",
        checkpoint=other(tiny_clip.open_clip_state()),
        tokenizer=bert,
    )
    refused(
        "is a folder: give ImageReward's file",
        "imagereward",
        checkpoint=str(folder / "tower"),
        tokenizer=bert,
    )
    right = str(folder / "ImageReward.pt")
    refused(
        "holds no BERT tokenizer",
        "imagereward",
        checkpoint=right,
        tokenizer=str(folder / "tower" / ".."),
    )
    refused("could not be read from the hub", "imagereward", checkpoint=right)
    refused(
        "imagereward has no model_config", "imagereward", checkpoint=right, model_config="x.json"
    )
    longer = tiny_blip.write_tokenizer(tmp_path / "longer")
    (longer / "vocab.txt").write_text(
        "\n".join([*tiny_blip.VOCABULARY, *(f"w{i}" for i in range(9))]) + "\n"
    )
    refused("tokens and .* knows", "imagereward", checkpoint=right, tokenizer=str(longer))


def test_the_published_files_are_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.extend((repo, pattern) for pattern in allow_patterns)
        return str(
            {
                "google-bert/bert-base-uncased": folder / "bert",
                "openai/clip-vit-large-patch14": folder / "tower",
            }.get(repo, folder)
        )

    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", snapshot_download)
    check_scorer("imagereward")
    check_scorer("aesthetic")
    assert not any(
        pattern.endswith((".pt", ".pth", ".bin", ".safetensors")) for _, pattern in asked
    )
    close(load_scorer("imagereward")(CROPPED, WORDS), rewards(tiny_blip.state_dict()))
    assert ("THUDM/ImageReward", "ImageReward.pt") in asked
    (folder / "sac+logos+ava1-l14-linearMSE.pth").write_bytes((folder / "head.pth").read_bytes())
    assert torch.equal(load_scorer("aesthetic")(CROPPED, WORDS), aesthetic(folder)(CROPPED, WORDS))
    assert ("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth") in asked
