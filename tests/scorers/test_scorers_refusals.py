"""What a user may get wrong about a scorer: told in one sentence, by the cheap check and by loading
alike, before a weight is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deradiff.scorers import check_scorer, checkpoints, load_scorer, open_clip
from tests.support import tiny_clip
from tests.support.tiny_clip import MODEL_CONFIG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    tiny_clip.write_state(folder / "hps.pt", tiny_clip.open_clip_state())
    tiny_clip.write_tokenizer(folder / "tokenizer")
    tiny_clip.write_config(folder / "model.json", MODEL_CONFIG)
    tiny_clip.write_huggingface(folder / "hf", tiny_clip.huggingface_model())
    tiny_clip.write_huggingface(
        folder / "bare", tiny_clip.huggingface_model(), tokenizer=False, processor=False
    )
    return folder


@pytest.fixture
def refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Asserts that both ways refuse with these words, in one line, and that no network was made for
    it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        checkpoints.Checkpoint, "load", lambda self: pytest.fail("weights were loaded")
    )

    def assert_refused(words: str, name: str, *paths: str | Path | None) -> None:
        arguments = [str(folder / path) if isinstance(path, Path) else path for path in paths]
        for call in (check_scorer, load_scorer):
            with pytest.raises(ValueError, match=words) as error:
                call(name, *arguments)
            assert "\n" not in str(error.value)

    return assert_refused


TOKENIZER, CONFIG = Path("tokenizer"), Path("model.json")


def test_the_check_passes_what_can_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoints.Checkpoint, "load", lambda self: pytest.fail("weights were loaded")
    )
    check_scorer("vivid")
    check_scorer("pickscore", str(folder / "hf"))
    check_scorer("pickscore", str(folder / "bare"), str(folder / "tokenizer"))
    check_scorer("hpsv2", *(str(folder / name) for name in ("hps.pt", "tokenizer", "model.json")))


def test_names(refused) -> None:
    refused(
        "there is no scorer 'pikscore'; the scorers are pickscore, hpsv2, hpsv2.1, clip", "pikscore"
    )
    refused("crisp is a formula.*leave out checkpoint", "crisp", "x")


def test_missing_checkpoints(refused, tmp_path: Path) -> None:
    refused("there is no checkpoint .*none.pt", "hpsv2", Path("none.pt"))
    refused("there is no checkpoint weights/none.pt", "hpsv2", "weights/none.pt")
    refused("there is no checkpoint runs/none", "clip", "runs/none")
    refused("org/name is no local path and could not be read from the hub", "clip", "org/name")
    refused(
        "laion.* could not be read from the hub", "hpsv2", Path("hps.pt"), None, CONFIG
    )  # nobody named the tokenizer
    (tmp_path / "weights.zip").write_bytes(b"")
    refused(
        "must be a folder, or a .pt, .pth, .bin or .safetensors file",
        "clip",
        str(tmp_path / "weights.zip"),
    )


def test_folders_of_another_kind(refused, folder: Path, tmp_path: Path) -> None:
    refused("is no CLIPModel folder", "clip", TOKENIZER)
    tiny_clip.write_config(tmp_path / "config.json", {"model_type": "siglip"})
    refused("config.json of model_type clip", "clip", str(tmp_path))
    refused("remove model_config", "clip", Path("hf"), None, CONFIG)
    tiny_clip.huggingface_model().config.save_pretrained(tmp_path)
    refused("holds no model.safetensors or pytorch_model.bin", "clip", str(tmp_path), TOKENIZER)
    refused("could not be read from the hub", "clip", Path("bare"))
    refused("holds no CLIP tokenizer", "clip", Path("bare"), Path("bare"))


def test_state_dicts_of_another_size_or_layout(refused, folder: Path, tmp_path: Path) -> None:
    refused(
        r"is not an open_clip state dict of that model \(set model_config=\)",
        "hpsv2",
        Path("hps.pt"),
        TOKENIZER,
    )
    state = tiny_clip.open_clip_state()
    refused_as = r"visual_projection.weight is {} there, not {}$"
    for name, changed, words in (
        (
            "short",
            {k: v for k, v in state.items() if k != "visual.proj"},
            refused_as.format("nothing", r"\[20, 48\]"),
        ),
        (
            "narrow",
            state | {"visual.proj": torch.zeros(48, 19)},
            refused_as.format(r"\[19, 48\]", r"\[20, 48\]"),
        ),
        (
            "more",
            state | {"visual.extra": torch.zeros(2)},
            r"visual.extra is \[2\] there, not nothing",
        ),
    ):
        refused(
            words,
            "hpsv2",
            str(tiny_clip.write_state(tmp_path / f"{name}.pt", changed)),
            TOKENIZER,
            CONFIG,
        )
    refused(
        "is not an open_clip state dict", "clip", Path("hf/model.safetensors"), TOKENIZER, CONFIG
    )
    tiny_clip.write_huggingface(tmp_path / "hf", tiny_clip.huggingface_model())
    save_file(state, tmp_path / "hf" / "model.safetensors")
    refused("is not the CLIPModel of its config.json", "clip", str(tmp_path / "hf"))


def test_files_that_are_no_state_dict(refused, tmp_path: Path) -> None:
    for content in (torch.zeros(3), {"state_dict": {"a": 1}}):
        torch.save(content, tmp_path / "strange.pt")
        refused("is no state dict", "clip", str(tmp_path / "strange.pt"), TOKENIZER, CONFIG)
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not tensors at all")
        refused("holds no plain tensors", "clip", str(tmp_path / name), TOKENIZER, CONFIG)


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_executed(refused, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": tiny_clip.open_clip_state(), "trap": Trap(str(tmp_path / "sprung"))},
        tmp_path / "trap.pt",
    )
    refused(
        "deradiff unpickles nothing else", "hpsv2", str(tmp_path / "trap.pt"), TOKENIZER, CONFIG
    )
    assert not (tmp_path / "sprung").exists()


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
    refused, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = {key: value for key, value in (MODEL_CONFIG | change).items() if value is not None}
    refused(
        words,
        "hpsv2",
        Path("hps.pt"),
        TOKENIZER,
        str(tiny_clip.write_config(tmp_path / "model.json", config)),
    )


def test_model_configs_that_cannot_be_read(refused, tmp_path: Path) -> None:
    refused("is no readable json file", "hpsv2", Path("hps.pt"), TOKENIZER, "none.json")
    (tmp_path / "model.json").write_text("{")
    refused(
        "is no readable json file", "hpsv2", Path("hps.pt"), TOKENIZER, str(tmp_path / "model.json")
    )


def test_a_tokenizer_of_another_network(refused, folder: Path, tmp_path: Path) -> None:
    config = MODEL_CONFIG | {"text_cfg": MODEL_CONFIG["text_cfg"] | {"vocab_size": 100}}
    refused(
        "514 tokens and .* knows 100",
        "hpsv2",
        Path("hps.pt"),
        TOKENIZER,
        str(tiny_clip.write_config(tmp_path / "model.json", config)),
    )


def test_an_end_marker_that_the_network_does_not_know_is_warned_of(
    folder: Path, tmp_path: Path
) -> None:
    """transformers then reads the text at its first token, which is the same for every prompt."""
    tiny_clip.write_huggingface(tmp_path, tiny_clip.huggingface_model(eos_token_id=49407))
    with pytest.warns(UserWarning, match="ignore the prompt"):
        check_scorer("clip", str(tmp_path))


def test_published_checkpoints_are_asked_of_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub of three tiny repositories in place of the real one: which of its files are asked for,
    and when."""
    tiny_clip.write_huggingface(
        tmp_path / "yuvalkirstain" / "PickScore_v1", tiny_clip.huggingface_model(), tokenizer=False
    )
    tiny_clip.write_tokenizer(tmp_path / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    for file, seed in (("HPS_v2_compressed.pt", 2), ("HPS_v2.1_compressed.pt", 21)):
        (tmp_path / "xswu" / "HPSv2").mkdir(parents=True, exist_ok=True)
        tiny_clip.write_state(tmp_path / "xswu" / "HPSv2" / file, tiny_clip.open_clip_state(seed))
    asked: list[tuple[str, str]] = []

    def snapshot_download(repo: str, allow_patterns: list[str]) -> str:
        asked.extend((repo, pattern) for pattern in allow_patterns)
        return str(tmp_path / repo)

    monkeypatch.setattr("deradiff.scorers.checkpoints.snapshot_download", snapshot_download)
    monkeypatch.setattr(open_clip, "VIT_H_14", MODEL_CONFIG)
    for name in ("pickscore", "hpsv2", "hpsv2.1"):
        check_scorer(name)
    assert not any(pattern.endswith((".pt", ".bin", ".safetensors")) for _, pattern in asked)

    image, prompt = tiny_clip.Image.new("RGB", (40, 30), "red"), "a fox"
    network = tiny_clip.Network(tiny_clip.under_open_clip_names(tiny_clip.huggingface_model()))
    scorer = load_scorer("pickscore")
    cosine = network.cosine(tiny_clip.cropped(image), tiny_clip.tokens(prompt))
    # type: ignore[attr-defined]
    assert scorer([image], [prompt]).item() / scorer.factor == pytest.approx(cosine, abs=1e-5)
    assert ("yuvalkirstain/PickScore_v1", "model.safetensors") in asked
    for name, file, seed in (
        ("hpsv2", "HPS_v2_compressed.pt", 2),
        ("hpsv2.1", "HPS_v2.1_compressed.pt", 21),
    ):
        wanted = tiny_clip.Network(tiny_clip.open_clip_state(seed)).cosine(
            tiny_clip.letterboxed(image), tiny_clip.tokens(prompt)
        )
        assert load_scorer(name)([image], [prompt]).item() == pytest.approx(wanted, abs=1e-5)
        assert ("xswu/HPSv2", file) in asked


def test_a_typo_is_refused_without_importing_torch() -> None:
    code = (
        "import sys; from deradiff.scorers import check_scorer\ntry: "
        "check_scorer('x')\nexcept ValueError: sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )
