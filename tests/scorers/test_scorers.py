"""Scorers against an independent evaluation of checkpoints in the published layouts
(tests/tiny_clip.py)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from deradiff.scorers import SCORERS, base, clip, load_scorer, open_clip
from deradiff.scorers.base import digest
from deradiff.scorers.preparation import clean_text, letterbox
from deradiff.worlds import shapes
from tests.support import tiny_clip
from tests.support.tiny_clip import MODEL_CONFIG, SIDE, Network, cropped, letterboxed, tokens

# square, wide, tall, smaller than the network's side, and oblong with the longest side already
# right
SIZES = [(64, 64), (90, 50), (41, 77), (20, 13), (SIDE, 20), (SIDE, SIDE)]
PROMPTS = [
    "a red fox",
    "Two  FOXES",
    "it's 4 cats, & a dog",
    "fox",
    "caf\u00e9 noir",
    "a sentence that is longer than the context of this network",
]
HARD = [  # as typed, and as open_clip cleans it
    ("  A RED &amp;amp; blue\n\tfox ", "a red & blue fox"),
    ("it\u00e2\u20ac\u2122s a fox", "it's a fox"),  # mojibake of a curly apostrophe
    (
        "<i> salt &amp;amp; pepper",
        "<i> salt & pepper",
    ),  # ftfy unescapes by itself, once, but not where there is a "<"
    ("&lt;b&gt; Caf&eacute;", "<b> caf\u00e9"),
]


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A picture with as much detail as there can be, so that a wrong filter shows."""
    pixels = np.random.default_rng(seed).integers(
        0, 256, (size[1], size[0], len(mode)), dtype=np.uint8
    )
    return Image.fromarray(pixels, mode)


IMAGES = [noise(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout of one network, and a tokenizer and a model config apart from them."""
    folder = tmp_path_factory.mktemp("scorers")
    state = tiny_clip.open_clip_state()
    tiny_clip.write_state(folder / "hps.pt", state)
    tiny_clip.write_state(folder / "bare.bin", state, wrapped=False)
    save_file(state, folder / "open_clip.safetensors")
    tiny_clip.write_state(
        folder / "half.pt", {name: tensor.half() for name, tensor in state.items()}
    )
    tiny_clip.write_tokenizer(folder / "tokenizer")
    tiny_clip.write_config(folder / "model.json", MODEL_CONFIG)
    tiny_clip.write_config(folder / "quick.json", MODEL_CONFIG | {"quick_gelu": True})
    tiny_clip.write_config(folder / "hub.json", {"model_cfg": MODEL_CONFIG, "preprocess_cfg": {}})
    tiny_clip.write_huggingface(folder / "hf", tiny_clip.huggingface_model())
    return folder


def opened(
    folder: Path, name: str = "hpsv2", file: str = "hps.pt", config: str = "model.json"
) -> clip.CLIPScorer:
    # type: ignore[return-value]
    return load_scorer(name, str(folder / file), str(folder / "tokenizer"), str(folder / config))


def expected(
    network: Network, prepare, prompts: list[str], images: list[Image.Image] = IMAGES
) -> Tensor:
    return torch.tensor(
        [
            network.cosine(prepare(image), tokens(prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
    ).float()


def close(scores: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert scores.dtype == torch.float32 and scores.shape == wanted.shape
    torch.testing.assert_close(scores, wanted, rtol=0, atol=tolerance)


LOWER = [prompt.lower() for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "clip"])
def test_open_clip_checkpoint_scores_as_an_independent_evaluation(folder: Path, name: str) -> None:
    close(
        opened(folder, name)(IMAGES, PROMPTS),
        expected(Network(tiny_clip.open_clip_state()), letterboxed, LOWER),
    )


@pytest.mark.parametrize("file", ["bare.bin", "open_clip.safetensors"])
def test_every_file_of_a_state_dict_is_the_same_network(folder: Path, file: str) -> None:
    assert torch.equal(opened(folder, file=file)(IMAGES, PROMPTS), opened(folder)(IMAGES, PROMPTS))


def test_half_precision_weights_are_computed_in_single(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in tiny_clip.open_clip_state().items()}
    close(
        opened(folder, file="half.pt")(IMAGES, PROMPTS), expected(Network(half), letterboxed, LOWER)
    )


def test_the_hub_form_of_a_model_config_is_read(folder: Path) -> None:
    assert torch.equal(
        opened(folder, config="hub.json")(IMAGES, PROMPTS), opened(folder)(IMAGES, PROMPTS)
    )


def test_the_activation_is_the_configs(folder: Path) -> None:
    state = tiny_clip.open_clip_state()
    exact = expected(Network(state), letterboxed, LOWER)
    quick = expected(Network(state, tiny_clip.quick_gelu), letterboxed, LOWER)
    assert (exact - quick).abs().max() > 1e-3  # these weights tell the two apart
    close(opened(folder, config="quick.json")(IMAGES, PROMPTS), quick)


def test_the_preparations_differ_where_they_should() -> None:
    network = Network(tiny_clip.open_clip_state())
    difference = expected(network, letterboxed, LOWER) - expected(network, cropped, LOWER)
    assert difference.abs()[1:5].min() > 1e-3  # oblong: padding is not cropping


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_pickscore_scores_as_an_independent_evaluation(tmp_path: Path, activation: str) -> None:
    model = tiny_clip.huggingface_model(activation=activation)
    scorer = load_scorer(
        "pickscore", str(tiny_clip.write_huggingface(tmp_path / "pickscore", model))
    )
    network = Network(tiny_clip.under_open_clip_names(model), getattr(tiny_clip, activation))
    wanted = expected(network, cropped, LOWER)
    close(
        scorer(IMAGES, PROMPTS), float(np.exp(3.4)) * wanted, tolerance=3e-4
    )  # 1e-5 of the cosine, times the scale
    assert scorer.factor == pytest.approx(np.exp(3.4), rel=1e-6)  # type: ignore[attr-defined]
    close(scorer(IMAGES, PROMPTS) / scorer.factor, wanted)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "prepare"), [("clip", letterboxed), ("hpsv2", letterboxed), ("clip-l14", cropped)]
)
def test_a_clip_model_folder_brings_its_own_tokenizer_and_sizes(
    folder: Path, name: str, prepare
) -> None:
    network = Network(tiny_clip.under_open_clip_names(tiny_clip.huggingface_model()))
    close(load_scorer(name, str(folder / "hf"))(IMAGES, PROMPTS), expected(network, prepare, LOWER))


def test_a_clip_model_folder_of_weights_alone(folder: Path, tmp_path: Path) -> None:
    """As a hub repository of 2022: `pytorch_model.bin`, constants among the weights, tokenizer and
    processor elsewhere."""
    model = tiny_clip.huggingface_model()
    model.config.save_pretrained(tmp_path)
    torch.save(
        model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(24)[None]},
        tmp_path / "pytorch_model.bin",
    )
    scorer = load_scorer("pickscore", str(tmp_path), tokenizer=str(folder / "tokenizer"))
    assert torch.equal(
        scorer(IMAGES, PROMPTS), load_scorer("pickscore", str(folder / "hf"))(IMAGES, PROMPTS)
    )


def test_the_folders_image_processor_is_used(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    other = tiny_clip.write_huggingface(tmp_path, tiny_clip.huggingface_model())
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(other)
    for name in ("pickscore", "hpsv2"):
        difference = load_scorer(name, str(other))(IMAGES, PROMPTS) - load_scorer(
            name, str(folder / "hf")
        )(IMAGES, PROMPTS)
        assert difference.abs().max() > 1e-4


def test_prompts_are_cleaned_as_open_clip_does_but_not_for_pickscore(
    folder: Path, tmp_path: Path
) -> None:
    typed, cleaned = [list(column) for column in zip(*HARD, strict=True)]
    images = IMAGES[: len(HARD)]
    network = Network(tiny_clip.open_clip_state())
    close(opened(folder)(images, typed), expected(network, letterboxed, cleaned, images))
    assert [clean_text(text) for text in typed] == cleaned
    network = Network(tiny_clip.under_open_clip_names(tiny_clip.huggingface_model()))
    raw = load_scorer("pickscore", str(folder / "hf"))
    close(
        raw(images, typed) / raw.factor,
        expected(network, cropped, [text.lower() for text in typed], images),
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_any_mode_are_scored_as_rgb(folder: Path, name: str, mode: str) -> None:
    scorer = load_scorer(name, str(folder / "hf"))
    image = noise((60, 44), mode="RGBA") if mode == "RGBA" else noise((60, 44)).convert(mode)
    assert torch.equal(scorer([image], ["a fox"]), scorer([image.convert("RGB")], ["a fox"]))


def test_letterbox_pads_with_black_and_keeps_the_overshoot() -> None:
    half = Image.fromarray(
        np.repeat(np.uint8([[[0] * 3, [255] * 3]]), 20, axis=0).repeat(40, axis=1)
    )  # 80 x 20, black beside white
    boxed = letterbox(half, 32)
    assert boxed.shape == (3, 32, 32)
    assert (boxed[:, :12] == 0).all() and (boxed[:, 20:] == 0).all()
    assert boxed.max() > 1.01 and boxed.min() < -0.01  # bicubic, not clamped


@pytest.mark.parametrize("name", ["hpsv2", "pickscore"])
def test_a_score_depends_on_its_own_picture_and_prompt_alone(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "BATCH", 4)  # six pictures: a batch and a part of one
    scorer = load_scorer(name, str(folder / "hf"))
    prompts = ["a fox", "a dog", "a fox", "a dog", "a much longer prompt", "a fox"]
    together = scorer(IMAGES, prompts)
    alone = torch.cat(
        [scorer([image], [prompt]) for image, prompt in zip(IMAGES, prompts, strict=True)]
    )
    close(together, alone)
    assert len({round(score, 4) for score in together.tolist()}) == 6


def test_features_may_be_tensors_or_output_objects(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load_scorer("hpsv2", str(folder / "hf"))
    usual = scorer(IMAGES, PROMPTS)
    model = scorer.model  # type: ignore[attr-defined]
    for kind in ("image", "text"):
        original = getattr(model, f"get_{kind}_features")
        pooled = original(
            **(
                {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}
                if kind == "image"
                else {"input_ids": torch.tensor([[512, 513]])}
            )
        )
        plain = (lambda call: lambda **k: call(**k).pooler_output)(original)
        wrapped = (lambda call: lambda **k: SimpleNamespace(pooler_output=call(**k)))(plain)
        assert not isinstance(pooled, Tensor)
        for form in (plain, wrapped):
            monkeypatch.setattr(model, f"get_{kind}_features", form)
            assert torch.equal(scorer(IMAGES, PROMPTS), usual)


def test_scores_carry_no_gradient_and_may_be_none(folder: Path) -> None:
    scorer = opened(folder)
    assert not scorer(IMAGES, PROMPTS).requires_grad and not scorer.model.training
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        scorer(IMAGES[:2], ["a fox"])


def test_scorers_state_what_they_are(folder: Path, tmp_path: Path) -> None:
    hps, pick = opened(folder), load_scorer("pickscore", str(folder / "hf"))
    assert (hps.name, hps.scale, pick.scale) == ("hpsv2", "cosine", "logit-scaled cosine")
    assert (
        "black padding" in hps.preprocessing
        and "centre crop" in pick.preprocessing
        and str(SIDE) in hps.preprocessing
    )
    vocabulary = [
        path
        for name in ("tokenizer.json", "vocab.json", "merges.txt")
        if (path := folder / "tokenizer" / name).is_file()
    ]
    assert (
        hps.version == digest([folder / "hps.pt", folder / "model.json", *vocabulary])
        and len(hps.version) == 12
    )
    assert (
        opened(folder, "hpsv2.1").version
        == hps.version
        != opened(folder, config="quick.json").version
    )  # the activation is in no weight
    tiny_clip.write_state(tmp_path / "other.pt", tiny_clip.open_clip_state(seed=1))
    assert (
        load_scorer(
            "hpsv2",
            str(tmp_path / "other.pt"),
            str(folder / "tokenizer"),
            str(folder / "model.json"),
        ).version
        != hps.version
    )


def test_vit_h_14_is_what_laion_published() -> None:
    config = open_clip.clip_config(open_clip.VIT_H_14, eos_token_id=49407)
    vision, text = config.vision_config, config.text_config
    assert (
        vision.hidden_size,
        vision.intermediate_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
    ) == (1280, 5120, 32, 16)
    assert (
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
        text.num_attention_heads,
    ) == (1024, 4096, 24, 16)
    assert vision.hidden_act == text.hidden_act == "gelu" and (
        vision.image_size,
        vision.patch_size,
        config.projection_dim,
    ) == (
        224,
        14,
        1024,
    )
    assert (text.vocab_size, text.max_position_embeddings, text.eos_token_id) == (49408, 77, 49407)


@pytest.mark.parametrize("name", ["vivid", "crisp"])
def test_the_true_rewards_are_scorers(name: str) -> None:
    rng = np.random.default_rng(0)
    scenes = shapes.SCENES[::37]
    images = [Image.fromarray(pixels) for pixels in shapes.render(scenes, rng)]
    prompts = [str(scene) for scene in scenes]
    scorer = load_scorer(name)
    close(
        scorer([image.convert("RGBA") for image in images], tuple(prompts)),
        getattr(shapes, name)(images, prompts),
    )
    assert (
        (scorer.name, scorer.scale) == (name, "reward")
        and len(scorer.version) == 12
        and name in SCORERS
    )
    assert scorer([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 images and 0 prompts"):
        scorer(images[:1], [])


def test_colourful_is_hasler_and_suesstrunks_measure():
    halves = Image.new("RGB", (4, 2), (255, 0, 0))
    halves.paste((0, 0, 255), (2, 0, 4, 2))
    # red-green 255 and 0; yellow-blue 127.5 and -255: standard deviations 127.5 and 191.25, means
    # 127.5 and -63.75
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    grey, found = load_scorer("colourful")(
        [Image.new("RGB", (3, 3), (90, 90, 90)), halves], ["", ""]
    ).tolist()
    assert grey == 0 and found == pytest.approx(expected)
