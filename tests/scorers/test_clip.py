"""CLIP scorers against an independent evaluation of tiny checkpoints in the published layouts.

The evaluation is in tests/support/tiny_clip.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil

from deradiff.scorers import base, load_scorer
from deradiff.scorers.base import digest
from deradiff.scorers.preparation import clean_text
from tests.support import tiny_clip
from tests.support.scorer_images import IMAGES, PROMPTS, assert_close, noise
from tests.support.tiny_clip import MODEL_CONFIG, SIDE, Network, cropped, letterboxed, tokens

LOWER_CASE = [prompt.lower() for prompt in PROMPTS]

# Prompts as typed, and as open_clip cleans them. ftfy unescapes by itself, once, but not where
# there is a "<". The second holds a curly apostrophe that was wrongly decoded.
TYPED_AND_CLEANED = [
    ("  A RED &amp;amp; blue\n\tfox ", "a red & blue fox"),
    ("it\u00e2\u20ac\u2122s a fox", "it's a fox"),
    ("<i> salt &amp;amp; pepper", "<i> salt & pepper"),
    ("&lt;b&gt; Caf&eacute;", "<b> caf\u00e9"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout of one network, and a tokenizer and model configs apart from them."""
    folder = tmp_path_factory.mktemp("scorers")
    state = tiny_clip.open_clip_state()
    half = {name: tensor.half() for name, tensor in state.items()}
    tiny_clip.write_state(folder / "hps.pt", state)
    tiny_clip.write_state(folder / "bare.bin", state, wrapped=False)
    save_file(state, folder / "open_clip.safetensors")
    tiny_clip.write_state(folder / "half.pt", half)
    tiny_clip.write_tokenizer(folder / "tokenizer")
    tiny_clip.write_config(folder / "model.json", MODEL_CONFIG)
    tiny_clip.write_config(folder / "quick.json", MODEL_CONFIG | {"quick_gelu": True})
    tiny_clip.write_config(folder / "hub.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": {}})
    tiny_clip.write_huggingface(folder / "hf", tiny_clip.huggingface_model())
    return folder


def load_open_clip(
    folder: Path, name: str = "hpsv2", file: str = "hps.pt", config: str = "model.json"
) -> Any:
    """A scorer of an open_clip state dict of the fixture's."""
    return load_scorer(name, str(folder / file), str(folder / "tokenizer"), str(folder / config))


def load_folder(folder: Path, name: str) -> Any:
    """A scorer of the fixture's Hugging Face folder."""
    return load_scorer(name, str(folder / "hf"))


def open_clip_network(activation: Callable = tiny_clip.gelu) -> Network:
    """The independent evaluation of the fixture's open_clip state dict."""
    return Network(tiny_clip.open_clip_state(), activation)


def huggingface_network(activation: str = "gelu") -> Network:
    """The independent evaluation of the fixture's Hugging Face folder."""
    model = tiny_clip.huggingface_model(activation=activation)
    return Network(tiny_clip.under_open_clip_names(model), getattr(tiny_clip, activation))


def expected_cosines(
    network: Network,
    prepare: Callable[[Image.Image], np.ndarray],
    prompts: list[str],
    images: list[Image.Image] = IMAGES,
) -> Tensor:
    """Cosines (N,) by the independent evaluation."""
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        cosines.append(network.cosine(prepare(image), tokens(prompt)))
    return torch.tensor(cosines).float()


# The published layouts


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "clip"])
def test_open_clip_checkpoint_scores_as_an_independent_evaluation(folder: Path, name: str) -> None:
    scores = load_open_clip(folder, name)(IMAGES, PROMPTS)
    assert_close(scores, expected_cosines(open_clip_network(), letterboxed, LOWER_CASE))


@pytest.mark.parametrize("file", ["bare.bin", "open_clip.safetensors"])
def test_every_file_of_a_state_dict_is_the_same_network(folder: Path, file: str) -> None:
    scores = load_open_clip(folder, file=file)(IMAGES, PROMPTS)
    assert torch.equal(scores, load_open_clip(folder)(IMAGES, PROMPTS))


def test_half_precision_weights_are_computed_in_single(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in tiny_clip.open_clip_state().items()}
    scores = load_open_clip(folder, file="half.pt")(IMAGES, PROMPTS)
    assert_close(scores, expected_cosines(Network(half), letterboxed, LOWER_CASE))


def test_the_hub_form_of_a_model_config_is_read(folder: Path) -> None:
    scores = load_open_clip(folder, config="hub.json")(IMAGES, PROMPTS)
    assert torch.equal(scores, load_open_clip(folder)(IMAGES, PROMPTS))


def test_the_activation_is_the_configs(folder: Path) -> None:
    exact = expected_cosines(open_clip_network(), letterboxed, LOWER_CASE)
    quick = expected_cosines(open_clip_network(tiny_clip.quick_gelu), letterboxed, LOWER_CASE)
    assert (exact - quick).abs().max() > 1e-3, "these weights tell the two apart"
    assert_close(load_open_clip(folder, config="quick.json")(IMAGES, PROMPTS), quick)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_pickscore_scores_as_an_independent_evaluation(tmp_path: Path, activation: str) -> None:
    model = tiny_clip.huggingface_model(activation=activation)
    checkpoint = tiny_clip.write_huggingface(tmp_path / "pickscore", model)
    scorer: Any = load_scorer("pickscore", str(checkpoint))
    scores = scorer(IMAGES, PROMPTS)

    # 1e-5 of the cosine, times the scale
    cosines = expected_cosines(huggingface_network(activation), cropped, LOWER_CASE)
    assert_close(scores, float(np.exp(3.4)) * cosines, tolerance=3e-4)
    assert scorer.factor == pytest.approx(np.exp(3.4), rel=1e-6)
    assert_close(scores / scorer.factor, cosines)


@pytest.mark.parametrize(
    ("name", "prepare"), [("clip", letterboxed), ("hpsv2", letterboxed), ("clip-l14", cropped)]
)
def test_a_clip_model_folder_brings_its_own_tokenizer_and_sizes(
    folder: Path, name: str, prepare: Callable
) -> None:
    scores = load_folder(folder, name)(IMAGES, PROMPTS)
    assert_close(scores, expected_cosines(huggingface_network(), prepare, LOWER_CASE))


def test_a_clip_model_folder_of_weights_alone(folder: Path, tmp_path: Path) -> None:
    """As a hub repository of 2022: `pytorch_model.bin`, with constants among the weights.

    Tokenizer and image processor lie elsewhere.
    """
    model = tiny_clip.huggingface_model()
    model.config.save_pretrained(tmp_path)
    constants = {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    torch.save(model.state_dict() | constants, tmp_path / "pytorch_model.bin")

    scorer = load_scorer("pickscore", str(tmp_path), tokenizer=str(folder / "tokenizer"))
    expected = load_folder(folder, "pickscore")(IMAGES, PROMPTS)
    assert torch.equal(scorer(IMAGES, PROMPTS), expected)


# What happens to images and prompts


def test_the_preparations_differ_where_they_should() -> None:
    network = open_clip_network()
    padded = expected_cosines(network, letterboxed, LOWER_CASE)
    cut = expected_cosines(network, cropped, LOWER_CASE)
    oblong = slice(1, 5)
    assert (padded - cut)[oblong].abs().min() > 1e-3, "padding is not cropping"


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_the_folders_image_processor_is_used(folder: Path, tmp_path: Path, name: str) -> None:
    other = tiny_clip.write_huggingface(tmp_path, tiny_clip.huggingface_model())
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(other)
    scores = load_scorer(name, str(other))(IMAGES, PROMPTS)
    difference = scores - load_folder(folder, name)(IMAGES, PROMPTS)
    assert difference.abs().max() > 1e-4


def test_prompts_are_cleaned_as_open_clip_does(folder: Path) -> None:
    typed = [prompt for prompt, _ in TYPED_AND_CLEANED]
    cleaned = [prompt for _, prompt in TYPED_AND_CLEANED]
    images = IMAGES[: len(typed)]
    assert [clean_text(prompt) for prompt in typed] == cleaned

    expected = expected_cosines(open_clip_network(), letterboxed, cleaned, images)
    assert_close(load_open_clip(folder)(images, typed), expected)


def test_prompts_are_not_cleaned_for_pickscore(folder: Path) -> None:
    typed = [prompt for prompt, _ in TYPED_AND_CLEANED]
    images = IMAGES[: len(typed)]
    scorer = load_folder(folder, "pickscore")
    lower_case = [prompt.lower() for prompt in typed]
    expected = expected_cosines(huggingface_network(), cropped, lower_case, images)
    assert_close(scorer(images, typed) / scorer.factor, expected)


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_images_of_any_mode_are_scored_as_rgb(folder: Path, name: str, mode: str) -> None:
    scorer = load_folder(folder, name)
    image = noise((60, 44), mode="RGBA")
    if mode != "RGBA":
        image = noise((60, 44)).convert(mode)
    assert torch.equal(scorer([image], ["a fox"]), scorer([image.convert("RGB")], ["a fox"]))


# The protocol


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
def test_a_score_depends_on_its_own_image_and_prompt_alone(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH", 4)  # six images: a batch and a part of one
    scorer = load_folder(folder, name)
    prompts = ["a fox", "a dog", "a fox", "a dog", "a much longer prompt", "a fox"]
    together = scorer(IMAGES, prompts)
    pairs = zip(IMAGES, prompts, strict=True)
    alone = torch.cat([scorer([image], [prompt]) for image, prompt in pairs])
    assert_close(together, alone)
    assert len({round(score, 4) for score in together.tolist()}) == 6


@pytest.mark.parametrize("method", ["get_image_features", "get_text_features"])
def test_features_may_be_tensors_or_output_objects(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load_folder(folder, "hpsv2")
    scores = scorer(IMAGES, PROMPTS)
    original = getattr(scorer.model, method)

    def plain(**inputs: Tensor) -> Tensor:
        features = original(**inputs)
        assert not isinstance(features, Tensor)
        return features.pooler_output

    def wrapped(**inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(pooler_output=plain(**inputs))

    for form in (plain, wrapped):
        monkeypatch.setattr(scorer.model, method, form)
        assert torch.equal(scorer(IMAGES, PROMPTS), scores)


def test_scores_carry_no_gradient_and_may_be_none(folder: Path) -> None:
    scorer = load_open_clip(folder)
    assert not scorer(IMAGES, PROMPTS).requires_grad
    assert not scorer.model.training
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        scorer(IMAGES[:2], ["a fox"])


def test_scorers_state_what_they_are(folder: Path) -> None:
    hps = load_open_clip(folder)
    pickscore = load_folder(folder, "pickscore")
    assert hps.name == "hpsv2"
    assert hps.scale == "cosine"
    assert pickscore.scale == "logit-scaled cosine"
    assert "black padding" in hps.preprocessing
    assert "centre crop" in pickscore.preprocessing
    assert str(SIDE) in hps.preprocessing


def test_a_version_is_a_digest_of_all_files_that_decide_a_score(
    folder: Path, tmp_path: Path
) -> None:
    version = load_open_clip(folder).version
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    vocabulary = [folder / "tokenizer" / name for name in names]
    files = [folder / "hps.pt", folder / "model.json", *vocabulary]
    assert version == digest([file for file in files if file.is_file()])
    assert len(version) == 12
    assert load_open_clip(folder, "hpsv2.1").version == version

    # The activation is in no weight
    assert load_open_clip(folder, config="quick.json").version != version

    other = tiny_clip.write_state(tmp_path / "other.pt", tiny_clip.open_clip_state(seed=1))
    scorer = load_scorer("hpsv2", str(other), str(folder / "tokenizer"), str(folder / "model.json"))
    assert scorer.version != version
