"""The sample stage's modes, samplers and families.

What they sample, what the manifest says of it, and what the stage says it cost.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.tracking import TrackingConfig
from deradiff.method.samplers import SAMPLERS, samplers_for
from deradiff.models.families import FAMILIES
from deradiff.realignment.registry import BRANCHES
from sample.config import SAMPLING_DEFAULTS, SampleConfig
from sample.resolve import resolve
from sample.sampling import load_sampler
from sample.stage import run
from tests.support.sample_stage import (
    difference,
    prompt_seed,
    read_images,
    read_manifest,
    save_anchors,
)

PROMPTS = ["a red fox", "a blue cat"]
FOX = prompt_seed("a red fox", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base model, a full anchor and a LoRA of every family: see `save_anchors`."""
    return save_anchors(tmp_path_factory.mktemp("tiny"), FAMILIES, scale=0.3)


def config_of(tiny, anchor="sd15-lora", **options):
    """The config of a short run on two prompts."""
    usual = {
        "lambdas": [0.0, 0.5, 1.0],
        "prompts": PROMPTS,
        "steps": 3,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }
    path = str(tiny / anchor / "anchor")
    return SampleConfig(anchor=path, tracking=TrackingConfig("none"), **(usual | options))


# Families and samplers


def families_and_samplers():
    """Every sampler of SD1.5, SD3 and FLUX; of each other family its default or a plain one.

    FLUX and SD1.5 with what SD3 and SDXL have sampled with is slow.
    """
    combinations = [("sdxl", "euler")]
    for name, family in FAMILIES.items():
        if name in ("sd15", "sd3", "flux"):
            for sampler in samplers_for(family.flow):
                is_another = name == "sd3" or sampler not in ("euler", "flow_sde")
                marks = [] if is_another else [pytest.mark.slow]
                combinations.append(pytest.param(name, sampler, marks=marks))
        elif name != "sdxl":
            combinations.append((name, family.sampling.sampler))
    return combinations


def give_generator(scheduler, generator):
    """Let a scheduler draw from a generator that its pipelines do not pass on."""
    step = scheduler.step

    def step_with_generator(*args, **kwargs):
        return step(*args, generator=[generator], **kwargs)

    scheduler.step = step_with_generator


def guidance_of(name):
    """How a call of the family's pipeline with a plain prompt is guided."""
    family = FAMILIES[name]
    options = {family.guidance_argument: 3.0, **dict(family.call_options)}
    if family.negative_prompt is not None:
        options["negative_prompt"] = family.negative_prompt
    return options


@pytest.mark.parametrize(("family", "sampler"), families_and_samplers())
def test_every_family_and_sampler_is_the_stock_pipeline_at_both_ends(
    tiny, tmp_path, family, sampler
):
    config = config_of(tiny, f"{family}-lora", sampler=sampler, prompts=PROMPTS[:1], path_kl=False)
    run(config, tmp_path / "run")
    images = read_images(tmp_path / "run")
    config, base, (anchor,) = resolve(config)

    stock_images = []
    for lam in (0.0, 1.0):
        pipe = load_sampler(config, base, torch.device("cpu"))
        if lam:
            pipe.load_lora_weights(anchor.root)
        noise = torch.Generator().manual_seed(FOX.generator_seed)
        if sampler == "flow_sde":
            give_generator(pipe.scheduler, noise)
        output = pipe(
            prompt="a red fox",
            num_inference_steps=3,
            height=64,
            width=64,
            generator=[noise],
            **guidance_of(family),
        )
        stock = np.asarray(output.images[0]).astype(int)
        stock_images.append(stock)
        # The text encoders of the flow families see another batch, which rounds otherwise
        tolerance = 1 if SAMPLERS[sampler].flow else 0
        assert abs(images[FOX.image((lam,))] - stock).max() <= tolerance, f"lam {lam}"

    half = images[FOX.image((0.5,))]
    for stock in stock_images:
        assert abs(half - stock).mean() > 0.1


@pytest.mark.parametrize(
    ("anchor", "options"), [("sd3-lora", {"sampler": "flow_sde"}), ("sd15-lora", {"particles": 2})]
)
def test_an_image_does_not_depend_on_its_batch(tiny, tmp_path, anchor, options):
    config = config_of(tiny, anchor, lambdas=[0.5], **options)
    run(replace(config, batch_size=2), tmp_path / "together")
    run(replace(config, batch_size=1, prompts=PROMPTS[::-1]), tmp_path / "alone")
    together = read_images(tmp_path / "together")
    assert difference(together, read_images(tmp_path / "alone"), lam=0.5) <= 1


def test_the_defaults_name_samplers_that_exist():
    for name, defaults in SAMPLING_DEFAULTS.items():
        is_flow = name in FAMILIES and FAMILIES[name].flow
        assert SAMPLERS[defaults.sampler].flow == is_flow


# What a mode costs


@pytest.fixture
def sweep(tiny, tmp_path):
    """A function that samples two lambdas in eight steps into `tmp_path / name`.

    It returns the evaluations a step by lambda, and the first record.
    """

    def sample(name, **options):
        config = config_of(tiny, steps=8, batch_size=2, lambdas=[0.3, 0.7], **options)
        run(config, tmp_path / name)
        records = read_manifest(tmp_path / name)
        evaluations = {}
        for record in records:
            assert record["seconds"] > 0
            assert record["timesteps_sha256"] == records[0]["timesteps_sha256"]
            evaluations[record["lam"]] = record["evaluations"]
        return evaluations, records[0]

    return sample


def test_what_mode_exact_costs_is_in_the_manifest_and_said(sweep, capsys):
    evaluations, record = sweep("exact")
    assert evaluations == {0.3: 2, 0.7: 2}
    assert record["mode"] == "exact"
    assert record["every"] is None
    assert record["particles"] is None
    assert record["ess"] is None
    out = capsys.readouterr().out
    assert "mode exact: 2.00 evaluations a step" in out
    assert "beta_target 2857.14, a KL strength of " in out


def test_what_mode_reuse_costs_is_in_the_manifest_and_said(sweep, capsys):
    evaluations, record = sweep("reuse", mode="reuse", every=4)
    assert evaluations == {0.3: 1.25, 0.7: 1.25}
    assert record["mode"] == "reuse"
    assert record["every"] == 4
    assert "mode reuse (every 4 steps)" in capsys.readouterr().out


def test_mode_weights_costs_one_evaluation_and_measures_no_path_kl(sweep):
    evaluations, record = sweep("weights", mode="weights")
    assert evaluations == {0.3: 1, 0.7: 1}
    assert record["path_kl"] is None


def test_one_batch_for_both_networks_costs_the_same_and_samples_the_same(sweep, tmp_path):
    exact, _ = sweep("exact")
    batched, _ = sweep("batched", batched=True)
    assert batched == exact
    images = read_images(tmp_path / "batched")
    assert difference(images, read_images(tmp_path / "exact"), lam=0.3) <= 1


# Particles and the trust region


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_sde"])
def test_particles_on_a_flow(tiny, tmp_path, sampler):
    config = config_of(tiny, "flux-lora", particles=2, batch_size=2, sampler=sampler, lambdas=[0.5])
    run(config, tmp_path / "together")
    run(replace(config, batch_size=1, prompts=PROMPTS[::-1]), tmp_path / "alone")
    together = read_images(tmp_path / "together")
    assert difference(together, read_images(tmp_path / "alone"), lam=0.5) <= 1
    # Two chains from different noise have different weights
    for record in read_manifest(tmp_path / "together"):
        assert 1 <= record["ess"] < 2


def test_particles_leave_one_image_and_their_sample_size(tiny, tmp_path, capsys):
    config = config_of(tiny, particles=3, batch_size=2, sampler="ddpm", steps=4)
    run(config, tmp_path / "particles")
    run(replace(config, particles=1), tmp_path / "exact")
    records = read_manifest(tmp_path / "particles")
    assert len(records) == 6
    for record in records:
        assert record["mode"] == "particles"
        assert record["particles"] == 3
        assert record["path_kl"] is not None
        assert 1 <= record["ess"] <= 3
        # Between the ends, particles that differ have different weights
        if record["lam"] == 0.5:
            assert record["ess"] < 3
    out = capsys.readouterr().out
    assert out.count("the weights of particles are a heuristic") == 1
    assert "mode particles (3 an image)" in out


def test_the_trust_region_reaches_the_dial(tiny, tmp_path):
    config = config_of(tiny, "sd15-full", lambdas=[1.0, 2.0])
    run(replace(config, trust_region=1e-9), tmp_path / "bounded")
    run(config, tmp_path / "free")
    for record in read_manifest(tmp_path / "bounded"):
        assert record["trust_region"] == 1e-9

    # Bounded, lambda 2 samples what the anchor samples
    bounded = read_images(tmp_path / "bounded")
    anchor = {}
    for name, image in bounded.items():
        if name.startswith("lam=1.00"):
            anchor[name.replace("1.00", "2.00")] = image
    assert difference(anchor, bounded, lam=2.0) <= 2
    assert difference(anchor, read_images(tmp_path / "free"), lam=2.0) > 2


# Warnings


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"particles": 2, "batch_size": 1},
            "sample: with classifier-free guidance the weights of particles are a heuristic; ",
        ),
        ({"lambdas": [0.5, 2.0]}, "sample: lambda 2 lies beyond the anchor: it extrapolates, "),
    ],
)
def test_the_user_reads_once_and_before_the_first_image_what_realign_would_warn_of(
    tiny, tmp_path, capsys, options, sentence
):
    config = config_of(tiny, prompts=PROMPTS[:1], steps=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config, tmp_path)
    for warning in caught:
        assert "deradiff" not in warning.filename
        assert "beyond" not in str(warning.message)
        assert "heuristic" not in str(warning.message)
    assert capsys.readouterr().out.count(sentence) == 1


def test_lambda_may_act_on_one_branch_of_guidance(tiny, tmp_path):
    images = {}
    for branch in BRANCHES:
        config = config_of(tiny, lambdas=[0.0, 1.0], branch=branch)
        run(config, tmp_path / branch)
        images[branch] = read_images(tmp_path / branch)
        records = read_manifest(tmp_path / branch)
        is_both = branch == "both"
        assert {record["branch"] for record in records} == {None if is_both else branch}
        assert all(record["beta_target"] is None for record in records if not is_both)
        assert (f"-{branch}" in config.run_name()) != is_both
    for branch in BRANCHES[1:]:
        assert difference(images["both"], images[branch], lam=0.0) <= 1
        assert difference(images["both"], images[branch], lam=1.0) > 1
    assert difference(images["conditional"], images["unconditional"], lam=1.0) > 1

    with pytest.raises(ValueError, match="branch=conditional is for mode=exact without particles"):
        config_of(tiny, branch="conditional", mode="weights")
