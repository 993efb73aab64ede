"""The sample stage's config: what is refused, what nulls become, what runs are called.

Everything is refused before a weight is loaded.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sample.__main__  # noqa: F401 (it registers the schema)
from configs.entry import CONFIGS
from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import AnchorCard, save_anchor
from sample.config import SAMPLING_DEFAULTS, ModelConfig, SampleConfig
from sample.resolve import resolve
from sample.sampling import decodes_one_by_one
from sample.stage import run
from tests.support.tiny_pipelines import save_tiny, tiny_denoiser, tiny_lora, tiny_pipeline

LORA = "pytorch_lora_weights.safetensors"


def composed(*overrides):
    """The config that a command composes."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return OmegaConf.to_object(compose("sample", [*overrides]))


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    """<family>/anchor with its base beside it, and bare/anchor without a card."""
    folder = tmp_path_factory.mktemp("anchors")
    for family in ("sd15", "sdxl", "sd3", "flux"):
        base = save_tiny(family, folder / family / "base")
        card = AnchorCard(base_model=str(base), family=family, method="lora", beta=500.0)
        save_anchor(folder / family / "anchor", tiny_lora(tiny_denoiser(family)), card)
    save_anchor(folder / "bare/anchor", tiny_lora(tiny_pipeline("sd15").unet), card)
    (folder / "bare/anchor/anchor.json").unlink()
    return folder


@pytest.fixture
def config(anchors):
    """A good config for SD1.5."""
    anchor = str(anchors / "sd15/anchor")
    return SampleConfig(anchor=anchor, prompts=["a fox"], tracking=TrackingConfig("none"))


WEIGHT_LOADERS = (
    "sample.sweep.load_sampler",
    "safetensors.torch.load_file",
    "safetensors.safe_open",
    "torch.load",
)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def refuse(*arguments, **options):
        raise AssertionError("weights were loaded")

    for name in WEIGHT_LOADERS:
        monkeypatch.setattr(name, refuse)


@pytest.fixture
def no_sampling(monkeypatch):
    """Runs claim their folder and sample nothing."""
    monkeypatch.setattr("sample.sweep.sample_share", lambda *arguments: (0, 0.0))
    monkeypatch.setattr("sample.sweep.show", lambda *arguments: None)


# What is refused

BAD_VALUES = [
    ("lambdas", [], "at least one"),
    ("lambdas", [0.5, 0.5], "0.5 twice"),
    ("lambdas", [[0.3, 0.7]], "are numbers, and [0.3, 0.7] is not"),
    ("lambdas", [0.5, [0.7]], "are numbers, and [0.7] is not"),
    ("lam_schedule", [1], "give lam_schedule=[1,0.2]"),
    ("lam_schedule", [[0, 1], [0.5]], "give lam_schedule=[1,0.2]"),
    ("anchor", [], "at least one"),
    ("anchor", ["a", "a"], "holds a twice"),
    ("anchor", ["a", 3], "3 is none"),
    ("lambdas", [float("nan")], "nan is not"),
    ("lambdas", [1e300], "1e+300 is not"),
    ("lambdas", ["a"], "'a' is not"),
    ("lambdas", [float("inf")], "inf is not"),
    ("lambdas", [True], "True is not"),
    ("lambdas", 0.5, "is a list: give lambdas=[0.5]"),
    ("seeds", [], "at least one"),
    ("seeds", [1, 1], "1 twice"),
    ("seeds", [-1], "a seed of seeds must be a whole number of at least 0, below 2^63, not -1"),
    ("seeds", [0.5], "not 0.5"),
    ("mode", "fast", "one of exact, reuse, weights, sampled, not 'fast'"),
    ("sampler", "pndm", "one of ddim, ddpm, euler, euler_ancestral, dpmpp_2m,"),
    ("dtype", "int8", "one of float32, float16, bfloat16"),
    ("eta", 0.5, "belongs to sampler=ddim"),
    ("steps", 0, "above 0"),
    ("steps", 10**12, "must be at most 2147483648, not 1000000000000"),
    ("every", 0, "above 0"),
    ("particles", 0, "above 0"),
    ("prompts_limit", 0, "above 0"),
    ("trust_region", 0.0, "above 0"),
    ("trust_region", float("nan"), "finite"),
    ("bake", "x", "of one lambda"),
    ("batch_size", 0, "above 0"),
    ("guidance_scale", -1.0, "at least 0"),
    ("guidance_scale", float("nan"), "at least 0"),
    ("height", 500, "multiple of 8"),
    ("height", 0, "multiple of 8"),
    ("height", 8200, "must be at most 8192, not 8200"),
    ("width", -8, "multiple of 8"),
]


@pytest.mark.parametrize(("key", "value", "words"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_by_name(key, value, words):
    with pytest.raises(ValueError) as error:
        SampleConfig(**{"anchor": "x", key: value})
    message = str(error.value)
    assert key in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 2, "mode": "reuse"}, "give mode=exact"),
        ({"batched": True, "mode": "weights"}, "give mode=exact"),
        ({"trust_region": 1.0, "mode": "weights"}, "give mode=exact or mode=reuse"),
        ({"bake": "x", "lambdas": [0.0]}, "of one lambda"),
        ({"bake": "x", "lambdas": [0.5], "mode": "weights"}, "of one lambda"),
        ({"bake": "x", "lambdas": [0.5], "targets": [9.0]}, "of one lambda"),
    ],
)
def test_options_that_do_not_go_with_the_mode_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SampleConfig(anchor="x", **options)


@pytest.fixture
def check_refusal(config, anchors, tmp_path, no_weights):
    """A function that checks that a run of a changed config is refused in one sentence.

    It takes the words of the sentence, a family whose anchor is sampled, and other changes.
    """

    def check(words, family="sd15", **changes):
        changes = {"anchor": str(anchors / family / "anchor")} | changes
        with pytest.raises(ValueError) as error:
            run(replace(config, **changes), tmp_path / "run")
        message = str(error.value)
        assert words in message
        assert "\n" not in message
        assert not (tmp_path / "run").exists(), "nothing is left behind"

    return check


def test_an_anchor_that_does_not_exist_or_does_not_fit_is_refused(check_refusal, config, anchors):
    check_refusal("no anchor runs/train/gone/anchor", anchor="runs/train/gone/anchor")
    check_refusal("has no card to name its base: give model=sd15", "bare")
    sd15 = replace(config.model, base=str(anchors / "sd15/base"))
    check_refusal("family", "sdxl", model=sd15)
    check_refusal("no pipeline folder ./gone", model=replace(config.model, base="./gone"))


def test_an_anchor_of_another_family_is_refused_before_the_hub_is_asked(check_refusal):
    sdxl = composed("anchor=x", "model=sdxl").model
    sentence = "sd15/anchor is of family sd15 and the pipeline of sdxl: give both of one family"
    check_refusal(sentence, model=sdxl)


def test_a_sampler_or_side_that_the_family_does_not_have_is_refused(check_refusal):
    sentence = "sampler=flow_euler is not for sd15: give one of ddim, ddpm, euler, "
    check_refusal(sentence, sampler="flow_euler")
    sentence = "sampler=ddim is not for flux: give one of flow_euler, flow_sde"
    check_refusal(sentence, "flux", sampler="ddim")
    sentence = "height must be a multiple of 16 pixels for flux, not 72"
    check_refusal(sentence, "flux", height=72)


def test_prompts_that_are_missing_or_blank_are_refused(check_refusal):
    check_refusal("prompts=[] is empty: give a text file", prompts=None)
    check_refusal("prompt 2", prompts=["a fox", " "])
    check_refusal("prompts=a fox is no prompt file", prompts="a fox")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [4, 50, 300, 1000])
def test_ddim_that_would_miss_its_own_next_timestep_is_refused(
    config, anchors, no_weights, tmp_path, spacing, steps
):
    base = shutil.copytree(anchors / "sd15/base", tmp_path / "base")
    file = base / "scheduler/scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"timestep_spacing": spacing, "steps_offset": 0}))
    config = replace(
        config,
        anchor=str(anchors / "bare/anchor"),
        model=ModelConfig(base=str(base)),
        steps=steps,
        sampler="ddim",
    )
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    meets_timesteps = (scheduler.timesteps.diff() == -(1000 // steps)).all()
    if meets_timesteps:
        resolve(config)
        return
    remedy = "timestep: give sampler=euler$"
    if spacing == "trailing":
        remedy = "give steps=250, which divides 1000, or sampler=euler$"
    with pytest.raises(ValueError, match=remedy):
        resolve(config)
    resolve(replace(config, sampler="euler"))


# What a folder takes


def test_a_run_is_extended_by_other_lambdas_seeds_and_prompts(
    config, tmp_path, no_weights, no_sampling
):
    run(config, tmp_path)
    more = replace(config, lambdas=[3.0], seeds=[5], prompts=["a cat"])
    run(replace(more, batch_size=1, path_kl=False), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 7}, "steps (50 there, 7 here)"),
        ({"mode": "weights"}, "mode (exact there, weights here)"),
    ],
)
def test_a_folder_of_another_config_is_refused(
    config, tmp_path, no_weights, no_sampling, change, words
):
    run(config, tmp_path)
    with pytest.raises(ValueError, match="choose another name") as error:
        run(replace(config, **change), tmp_path)
    assert words in str(error.value)


def test_a_folder_of_an_anchor_that_was_trained_anew_is_refused(
    config, anchors, tmp_path, no_weights, no_sampling
):
    anchor = shutil.copytree(anchors / "sd15/anchor", tmp_path / "anchor")
    config = replace(config, anchor=str(anchor))
    run(config, tmp_path / "run")
    weights = (anchor / LORA).read_bytes()
    (anchor / LORA).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match="are not those that its card"):
        run(config, tmp_path / "run")

    # Its card is that of the new weights.
    card = json.loads((anchor / "anchor.json").read_text())
    card = {key: value for key, value in card.items() if "digest" not in key}
    (anchor / "anchor.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="anchor_sha256"):
        run(config, tmp_path / "run")


def test_the_claimed_config_is_plain(config, tmp_path, no_sampling):
    run(config, tmp_path)
    claimed = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert json.loads(json.dumps(claimed)) == claimed
    assert claimed["steps"] == 50
    assert len(claimed["anchor_sha256"]) == 16


# What nulls become

PUBLISHED = [
    ("sd15", "euler_ancestral", 50, 7.5, 8),
    ("sdxl", "euler_ancestral", 50, 5.0, 4),
    ("sd3", "flow_euler", 40, 4.5, 4),
    ("flux", "flow_euler", 50, 3.5, 1),
]


@pytest.mark.parametrize(("family", "sampler", "steps", "guidance", "batch"), PUBLISHED)
def test_nulls_become_the_published_settings_of_the_base_that_the_card_names(
    anchors, no_weights, family, sampler, steps, guidance, batch
):
    typed = SampleConfig(anchor=str(anchors / family / "anchor"), prompts=["a fox"])
    config, _, (anchor,) = resolve(typed)
    assert config.model.base == str(anchors / family / "base")
    assert anchor.card.beta == 500
    assert config.sampler == sampler
    assert config.steps == steps
    assert config.guidance_scale == guidance
    assert config.batch_size == batch
    assert config.dtype is not None
    assert config.prompts is not None
    assert config.path_kl
    assert f"-exact-{sampler}-steps{steps}-guidance{guidance:g}-prompts-" in config.run_name()

    # In mode weights it would cost as much as mode exact
    weights, _, _ = resolve(replace(typed, mode="weights"))
    assert not weights.path_kl


def test_the_shapes_world_brings_its_prompts_and_its_own_defaults(
    anchors, no_weights, monkeypatch, tmp_path
):
    save_tiny("sd15", tmp_path / "shapes/base")
    monkeypatch.setattr("deradiff.assets.ASSETS", tmp_path)
    bare = anchors / "bare/anchor"
    config, _, _ = resolve(composed(f"anchor={bare}", "model=shapes"))
    assert config.prompts == "shapes"
    assert config.steps == 20
    assert config.guidance_scale == 2.5
    assert (config.height, config.width) == (32, 32)


def test_targets_are_betas_to_imitate(config):
    # The anchor's beta is 500: its own is lambda 1, once
    config = replace(config, lambdas=[0.0, 1.0], targets=[500.0, 1000.0, 250.0])
    resolved, _, _ = resolve(config)
    assert resolved.lambdas == [0.0, 0.5, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"targets must be betas above 0, and 0\.0 is not"):
        replace(config, targets=[0.0])


def test_targets_of_an_anchor_without_a_beta_are_refused(config, anchors):
    base = ModelConfig(base=str(anchors / "sd15/base"))
    bare = replace(config, anchor=str(anchors / "bare/anchor"), model=base, targets=[500.0])
    with pytest.raises(ValueError, match="is not known, so targets cannot be turned into lambdas"):
        resolve(bare)


def test_targets_of_an_anchor_in_another_convention_of_beta_are_refused(config, anchors, tmp_path):
    folder = tmp_path / "anchor"
    shutil.copytree(config.anchor, folder)
    card = json.loads((folder / "anchor.json").read_text())
    del card["digest"]
    (folder / "anchor.json").write_text(json.dumps(card | {"beta_convention": "sum"}))
    foreign = replace(config, anchor=str(folder))
    assert resolve(foreign)[0].lambdas == resolve(config)[0].lambdas
    with pytest.raises(ValueError, match="is in the convention sum: give lambdas="):
        resolve(replace(foreign, targets=[500.0]))


# What commands compose, and what runs are called


def test_the_command_of_the_readme_composes():
    config = composed(
        "model=sdxl",
        "anchor=mhdang/dpo-sdxl-text2image-v1",
        "lambdas=[0,0.25,0.5,0.75,1]",
        "prompts=['a red fox, in snow',a cat]",
        "tracking=none",
    )
    assert config.model.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert config.prompts == ["a red fox, in snow", "a cat"]
    assert config.tracking.kind == "none"
    start = "mhdang-dpo-sdxl-text2image-v1-exact-euler_ancestral-prompts-"
    assert config.run_name().startswith(start)


def test_every_model_group_composes():
    bases = {
        "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "shapes": "asset:shapes/base",
    }
    for name, base in bases.items():
        assert composed("anchor=x", f"model={name}").model.base == base
    for name in ("sd3", "flux"):
        sampler = SAMPLING_DEFAULTS[name].sampler
        assert composed("anchor=x", f"model={name}").run_name() == f"x-exact-{sampler}"
    assert composed("anchor=x").model.base is None
    assert composed("anchor=x").tracking.kind == "wandb"


def test_other_prompts_are_another_run():
    """Added to a run that is compared with others they would spoil the comparison."""
    own = composed("anchor=x").run_name()
    assert composed("anchor=x", "prompts=shapes").run_name() == own
    named = composed("anchor=x", "prompts=a/my-words.txt").run_name()
    assert named.endswith("-my-words")
    cat = composed("anchor=x", "prompts=[cat]").run_name()
    dog = composed("anchor=x", "prompts=[dog]").run_name()
    assert len({own, named, cat, dog}) == 4


def name_of(**options):
    """The name of a run of an SD1.5 anchor."""
    anchor = "runs/train/shapes-dpo-lora-beta2000-seed0/anchor"
    usual = {"anchor": anchor, "model": ModelConfig(name="sd15")}
    return SampleConfig(**(usual | options)).run_name()


def test_runs_are_called_by_anchor_mode_and_sampler(tmp_path, monkeypatch):
    # `make demo` trains this very anchor in the checkout, and a card says more than model.name
    monkeypatch.chdir(tmp_path)
    assert name_of() == "shapes-dpo-lora-beta2000-seed0-exact-euler_ancestral"
    assert name_of(anchor="/somewhere/runs/train/a/anchor") == "a-exact-euler_ancestral"
    extended = name_of(anchor="runs/train/a/anchor", lambdas=[3.0], seeds=[4], batch_size=2)
    assert extended == "a-exact-euler_ancestral"
    assert name_of(name="mine", steps=3) == "mine"
    assert name_of(mode="reuse").endswith("-reuse4-euler_ancestral")
    assert name_of(particles=4).endswith("-particles4-euler_ancestral")
    assert name_of(model=ModelConfig(name="flux")).endswith("-exact-flow_euler")
    # A sampler that cannot be known yet is not named
    assert name_of(model=ModelConfig(base="org/some")).endswith("-exact")


def test_whatever_makes_images_differ_makes_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = [
        {},
        {"mode": "weights"},
        {"mode": "reuse"},
        {"mode": "reuse", "every": 2},
        {"particles": 4},
        {"trust_region": 0.5},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.5},
        {"steps": 3},
        {"guidance_scale": 3.0},
        {"height": 64},
        {"width": 64},
        {"anchor": "org/other"},
    ]
    names = [name_of(**change) for change in changes]
    assert len(set(names)) == len(names)
    for name in names:
        assert "/" not in name
        assert " " not in name


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "side", "batch", "expected"),
    [
        (torch.float16, False, 512, 8, False),  # SD1.5
        (torch.float16, False, 1024, 4, True),  # SDXL: 6.4 GB together
        (torch.float16, True, 512, 8, True),  # decoded in single precision
        (torch.float32, False, 32, 64, False),  # the shapes world
        (torch.float16, False, None, 4, True),  # the pipeline's own size
    ],
)
def test_images_are_decoded_one_by_one_where_a_batch_takes_gigabytes(
    dtype, force_upcast, side, batch, expected
):
    vae = SimpleNamespace(dtype=dtype, config=SimpleNamespace(force_upcast=force_upcast))
    pipe = SimpleNamespace(vae=vae, default_sample_size=128, vae_scale_factor=8)
    config = SampleConfig(anchor="a", batch_size=batch, height=side, width=side)
    assert decodes_one_by_one(config, pipe) == expected
