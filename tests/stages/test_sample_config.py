"""What the sample stage refuses, and that it does so before a weight loads; what its nulls become; what its runs are called."""

import json
import shutil
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import sample.__main__  # noqa: F401 (it registers the schema)
from configs.entry import CONFIGS
from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import AnchorCard, save_anchor
from sample.config import SAMPLING_DEFAULTS, SampleConfig
from sample.resolve import resolve
from sample.stage import run
from tests.support.tiny_pipelines import save_tiny, tiny_denoiser, tiny_lora, tiny_pipeline


def composed(*overrides):
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
def no_weights(monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("weights were loaded")

    for name in (
        "sample.sweep.load_sampler",
        "safetensors.torch.load_file",
        "safetensors.safe_open",
        "torch.load",
    ):
        monkeypatch.setattr(name, loaded)


BAD = {
    "lambdas": [
        ([], "at least one"),
        ([0.5, 0.5], "0.5 twice"),
        ([-0.1], "-0.1 is not"),
        ([float("nan")], "nan is not"),
        (["a"], "'a' is not"),
        ([float("inf")], "inf is not"),
        ([True], "True is not"),
        (0.5, "must be a list"),
    ],
    "seeds": [
        ([], "at least one"),
        ([1, 1], "1 twice"),
        ([-1], "-1 is not"),
        ([0.5], "0.5 is not"),
    ],
    "mode": [("fast", "one of exact, reuse, weights, not 'fast'")],
    "sampler": [("pndm", "one of ddim, ddpm, euler, euler_ancestral, dpmpp_2m,")],
    "dtype": [("int8", "one of float32, float16, bfloat16")],
    "eta": [(0.5, "belongs to sampler=ddim")],
    "steps": [(0, "at least 1")],
    "every": [(0, "at least 1")],
    "particles": [(0, "at least 1")],
    "prompts_limit": [(0, "at least 1")],
    "trust_region": [(0.0, "above 0"), (float("nan"), "above 0")],
    "bake": [("x", "of one lambda")],
    "batch_size": [(0, "at least 1")],
    "guidance_scale": [(-1.0, "at least 0"), (float("nan"), "at least 0")],
    "height": [(500, "multiple of 8"), (0, "multiple of 8")],
    "width": [(-8, "multiple of 8")],
}


@pytest.mark.parametrize(
    ("key", "value", "said"), [(key, *case) for key, cases in BAD.items() for case in cases]
)
def test_a_value_that_cannot_be_is_refused_by_name(key, value, said):
    with pytest.raises(ValueError) as error:
        SampleConfig(anchor="x", **{key: value})
    assert key in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_work_together_is_refused_before_a_weight_loads(anchors, tmp_path, no_weights):
    good = SampleConfig(
        anchor=str(anchors / "sd15/anchor"), prompts=["a fox"], tracking=TrackingConfig("none")
    )

    def refused(said, **changes):
        with pytest.raises(ValueError) as error:
            run(replace(good, **changes), tmp_path / "run")
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)
        assert not (tmp_path / "run").exists(), "nothing is left behind"

    refused("no anchor runs/train/gone/anchor", anchor="runs/train/gone/anchor")
    refused("has no card to name its base: give model=sd15", anchor=str(anchors / "bare/anchor"))
    refused(
        "family",
        anchor=str(anchors / "sdxl/anchor"),
        model=replace(good.model, base=str(anchors / "sd15/base")),
    )
    published = composed("anchor=x", "model=sdxl").model  # of the hub, which is not asked
    refused(
        "sd15/anchor is of family sd15 and the pipeline of sdxl: give both of one family",
        model=published,
    )
    refused("there is no pipeline folder ./gone", model=replace(good.model, base="./gone"))
    refused("empty; give prompts=", prompts=None)
    refused(
        "sampler=flow_euler is not for sd15: give one of ddim, ddpm, euler, ", sampler="flow_euler"
    )
    flux = {"anchor": str(anchors / "flux/anchor")}
    refused(
        "sampler=ddim is not for flux: give one of flow_euler, flow_sde", **flux, sampler="ddim"
    )
    refused("height must be a multiple of 16 pixels for flux, not 72", **flux, height=72)
    refused("prompt 2", prompts=["a fox", " "])
    refused("no prompt file", prompts="a fox")


def test_ddim_that_would_miss_its_own_next_timestep_is_refused(anchors, no_weights, tmp_path):
    from diffusers import DDIMScheduler

    base = tmp_path / "base"
    shutil.copytree(anchors / "sd15/base", base)
    written = base / "scheduler/scheduler_config.json"
    plain = json.loads(written.read_text())
    good = SampleConfig(
        anchor=str(anchors / "bare/anchor"),
        prompts=["a fox"],
        model=sample.config.ModelConfig(base=str(base)),
    )
    for spacing in ("leading", "trailing", "linspace"):
        written.write_text(json.dumps(plain | {"timestep_spacing": spacing, "steps_offset": 0}))
        resolve(replace(good, sampler="euler", steps=300))
        for steps in (4, 50, 300, 1000):
            scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
            scheduler.set_timesteps(steps)
            if (scheduler.timesteps.diff() == -(1000 // steps)).all():
                resolve(replace(good, sampler="ddim", steps=steps))
            else:
                said = (
                    r"give steps=250, which divides 1000, or sampler=euler$"
                    if spacing == "trailing"
                    else "timestep: give sampler=euler$"
                )
                with pytest.raises(ValueError, match=said):
                    resolve(replace(good, sampler="ddim", steps=steps))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"particles": 2, "mode": "reuse"}, "give mode=exact"),
        ({"batched": True, "mode": "weights"}, "give mode=exact"),
        ({"trust_region": 1.0, "mode": "weights"}, "give mode=exact or mode=reuse"),
        ({"bake": "x", "lambdas": [0.0]}, "of one lambda"),
        ({"bake": "x", "lambdas": [0.5], "mode": "weights"}, "of one lambda"),
        ({"bake": "x", "lambdas": [0.5], "targets": [9.0]}, "of one lambda"),
    ],
)
def test_modes_that_do_not_go_together_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SampleConfig(anchor="x", **options)


def test_a_folder_of_another_config_or_of_an_anchor_trained_anew_is_refused(
    anchors, tmp_path, no_weights, monkeypatch
):
    config = SampleConfig(
        anchor=str(anchors / "sd15/anchor"), prompts=["a fox"], tracking=TrackingConfig("none")
    )
    monkeypatch.setattr("sample.sweep.sample_share", lambda *arguments: (0, 0.0))
    monkeypatch.setattr("sample.sweep.show", lambda *arguments: None)
    run(config, tmp_path)
    run(
        replace(config, lambdas=[3.0], seeds=[5], prompts=["a cat"], batch_size=1, path_kl=False),
        tmp_path,
    )
    for change, said in (
        ({"steps": 7}, "steps (50 there, 7 here)"),
        ({"mode": "weights"}, "mode (exact there, weights here)"),
    ):
        with pytest.raises(ValueError, match="choose another name") as error:
            run(replace(config, **change), tmp_path)
        assert said in str(error.value)
    weights = anchors / "sd15/anchor/pytorch_lora_weights.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before + b" ")
    with pytest.raises(ValueError, match="anchor_sha256"):
        run(config, tmp_path)
    weights.write_bytes(before)


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
    config, _, anchor = resolve(
        SampleConfig(anchor=str(anchors / family / "anchor"), prompts=["a fox"])
    )
    assert config.model.base == str(anchors / family / "base") and anchor.card.beta == 500
    assert (config.sampler, config.steps, config.guidance_scale, config.batch_size) == (
        sampler,
        steps,
        guidance,
        batch,
    )
    assert None not in (config.dtype, config.prompts) and config.path_kl
    assert f"-exact-{sampler}-steps{steps}-guidance{guidance:g}-prompts-" in config.run_name()
    assert not resolve(SampleConfig(anchor=config.anchor, mode="weights", prompts=["a fox"]))[
        0
    ].path_kl, "it would cost as much as exact"


def test_the_shapes_world_brings_its_prompts_and_its_own_defaults(
    anchors, no_weights, monkeypatch, tmp_path
):
    save_tiny("sd15", tmp_path / "shapes/base")
    monkeypatch.setattr("deradiff.files.ASSETS", tmp_path)
    config, _, _ = resolve(
        replace(composed("anchor=" + str(anchors / "bare/anchor"), "model=shapes"))
    )
    assert (config.prompts, config.steps, config.guidance_scale, config.height, config.width) == (
        "shapes",
        20,
        2.5,
        32,
        32,
    )


def test_the_commands_of_the_readme_compose():
    public = composed(
        "model=sdxl",
        "anchor=mhdang/dpo-sdxl-text2image-v1",
        "lambdas=[0,0.25,0.5,0.75,1]",
        "prompts=['a red fox, in snow',a cat]",
        "tracking=none",
    )
    assert public.model.base == "stabilityai/stable-diffusion-xl-base-1.0" and public.prompts == [
        "a red fox, in snow",
        "a cat",
    ]
    assert public.tracking.kind == "none" and public.run_name().startswith(
        "mhdang-dpo-sdxl-text2image-v1-exact-euler_ancestral-prompts-"
    )
    assert (
        composed("anchor=x", "model=sd15").model.base
        == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    for name in ("sd3", "flux"):
        assert (
            composed("anchor=x", f"model={name}").run_name()
            == f"x-exact-{SAMPLING_DEFAULTS[name].sampler}"
        )
    assert composed("anchor=x", "model=shapes").model.base == "asset:shapes/base"
    assert composed("anchor=x").model.base is None and composed("anchor=x").tracking.kind == "wandb"


def test_other_prompts_are_another_run():
    """Added to a run that is compared with others they would spoil the comparison."""
    names = [
        composed("anchor=x", *prompts).run_name()
        for prompts in (
            [],
            ["prompts=shapes"],
            ["prompts=a/my-words.txt"],
            ["prompts=[cat]"],
            ["prompts=[dog]"],
        )
    ]
    assert names[0] == names[1] and names[2].endswith("-my-words") and len(set(names)) == 4


def test_runs_are_called_by_what_makes_their_images_differ():
    def name(**options):
        settings = {
            "anchor": "runs/train/shapes-dpo-lora-beta2000-seed0/anchor",
            "model": sample.config.ModelConfig(name="sd15"),
        }
        return SampleConfig(**(settings | options)).run_name()

    assert name() == "shapes-dpo-lora-beta2000-seed0-exact-euler_ancestral"
    assert name(anchor="/somewhere/runs/train/a/anchor") == "a-exact-euler_ancestral"
    assert (
        name(anchor="runs/train/a/anchor", lambdas=[3.0], seeds=[4], batch_size=2)
        == "a-exact-euler_ancestral"
    )
    assert name(name="mine", steps=3) == "mine"
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
    ]
    names = [name(**change) for change in [*changes, {"width": 64}, {"anchor": "org/other"}]]
    assert len(set(names)) == len(names) and not [n for n in names if "/" in n or " " in n]
    assert name(mode="reuse").endswith("-reuse4-euler_ancestral") and name(particles=4).endswith(
        "-particles4-euler_ancestral"
    )
    assert name(model=sample.config.ModelConfig(name="flux")).endswith("-exact-flow_euler")
    assert name(model=sample.config.ModelConfig(base="org/some")).endswith("-exact"), (
        "a sampler that cannot be known is not named"
    )


def test_the_claimed_config_is_plain(anchors, tmp_path, monkeypatch):
    import yaml

    monkeypatch.setattr("sample.sweep.sample_share", lambda *arguments: (0, 0.0))
    monkeypatch.setattr("sample.sweep.show", lambda *arguments: None)
    run(
        SampleConfig(
            anchor=str(anchors / "sd15/anchor"), prompts=["a fox"], tracking=TrackingConfig("none")
        ),
        tmp_path,
    )
    claimed = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (
        json.loads(json.dumps(claimed)) == claimed
        and claimed["steps"] == 50
        and len(claimed["anchor_sha256"]) == 16
    )


def test_targets_are_betas_to_imitate(anchors):
    config = SampleConfig(
        anchor=str(anchors / "sd15/anchor"),
        lambdas=[0.0, 1.0],
        targets=[500.0, 1000.0, 250.0],
        prompts=["a fox"],
    )
    assert resolve(config)[0].lambdas == [
        0.0,
        0.5,
        1.0,
        2.0,
    ]  # the anchor's beta is 500: its own is lambda 1, once
    with pytest.raises(ValueError, match=r"targets must be betas above 0, and 0\.0 is not"):
        replace(config, targets=[0.0])
    bare = replace(
        config,
        anchor=str(anchors / "bare/anchor"),
        model=sample.config.ModelConfig(base=str(anchors / "sd15/base")),
    )
    with pytest.raises(ValueError, match="is not known, so targets cannot be turned into lambdas"):
        resolve(bare)
