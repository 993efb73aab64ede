"""The sample stage's modes, samplers and families: what they sample, what the manifest says of it, and what the stage says it cost."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.data.prompts import Prompt, prompt_id
from deradiff.method.samplers import SAMPLERS
from deradiff.models.families import FAMILIES
from sample.config import SAMPLING_DEFAULTS, SampleConfig
from sample.manifest import image_path
from sample.resolve import resolve
from sample.sampling import PromptSeed, load_sampler
from sample.stage import run
from tests.support.tiny_pipelines import (
    VISIBLE,
    perturbed_denoiser,
    save_tiny,
    tiny_lora,
    tiny_pipeline,
)

PROMPTS = ["a red fox", "a blue cat"]


def generator_seed(text, seed):
    return PromptSeed(Prompt(prompt_id(text), text), seed).generator_seed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """<family>-base and <family>-full/anchor, <family>-lora/anchor for every family."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        base, pipe = save_tiny(family, folder / f"{family}-base"), tiny_pipeline(family)
        denoiser = getattr(pipe, FAMILIES[family].denoiser)
        for method, anchor in (
            ("full", perturbed_denoiser(denoiser, 0.3)),
            ("lora", tiny_lora(denoiser, scale=VISIBLE)),
        ):
            card = AnchorCard(base_model=str(base), family=family, method=method, beta=2000.0)
            save_anchor(folder / f"{family}-{method}/anchor", anchor, card)
    return folder


def config_of(tiny, anchor="sd15-lora", **options):
    given = {
        "lambdas": [0.0, 0.5, 1.0],
        "prompts": PROMPTS,
        "steps": 3,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }
    return SampleConfig(
        anchor=str(tiny / anchor / "anchor"), tracking=TrackingConfig("none"), **(given | options)
    )


def manifest(run_dir):
    return [json.loads(line) for line in (run_dir / "manifest.jsonl").read_text().splitlines()]


def pixels(run_dir):
    return {
        r["image"]: np.asarray(Image.open(run_dir / r["image"])).astype(int)
        for r in manifest(run_dir)
    }


def apart(one, other, lam):
    names = [name for name in one if name.startswith(f"lam={lam:.2f}")]
    return max(abs(one[name] - other[name]).max() for name in names)


FITTING = [("sdxl", "euler")] + [
    (f, s)
    for f in FAMILIES
    for s in SAMPLERS
    if SAMPLERS[s].flow == FAMILIES[f].flow and f != "sdxl"
]


@pytest.mark.parametrize(("family", "sampler"), FITTING)
def test_every_family_and_sampler_is_the_stock_pipeline_at_both_ends(
    tiny, tmp_path, family, sampler
):
    config = config_of(tiny, f"{family}-lora", sampler=sampler, prompts=PROMPTS[:1], path_kl=False)
    run(config, tmp_path / "run")
    config, base, found = resolve(config)
    made, stock = pixels(tmp_path / "run"), {}
    for lam in (0.0, 1.0):
        pipe = load_sampler(config, base, torch.device("cpu"))
        if lam:
            pipe.load_lora_weights(found.root)
        noise = torch.Generator().manual_seed(generator_seed("a red fox", 0))
        if sampler == "flow_sde":  # its pipelines hand it no generator
            step = pipe.scheduler.step
            pipe.scheduler.step = lambda *args, step=step, noise=noise, **kwargs: step(
                *args, generator=[noise], **kwargs
            )
        call = {
            "num_inference_steps": 3,
            "guidance_scale": 3.0,
            "height": 64,
            "width": 64,
            "generator": [noise],
        }
        stock[lam] = np.asarray(pipe("a red fox", **call).images[0]).astype(int)
        off = abs(made[image_path(lam, prompt_id("a red fox"), 0)] - stock[lam]).max()
        assert off <= int(SAMPLERS[sampler].flow), (
            f"lam {lam}: {off}"
        )  # the text encoders see another batch
    half = made[image_path(0.5, prompt_id("a red fox"), 0)]
    assert all(abs(half - image).mean() > 0.1 for image in stock.values())


@pytest.mark.parametrize(
    ("anchor", "options"), [("sd3-lora", {"sampler": "flow_sde"}), ("sd15-lora", {"particles": 2})]
)
def test_an_image_does_not_depend_on_its_batch(tiny, tmp_path, anchor, options):
    config = config_of(tiny, anchor, lambdas=[0.5], **options)
    run(replace(config, batch_size=2), tmp_path / "together")
    run(replace(config, batch_size=1, prompts=PROMPTS[::-1]), tmp_path / "alone")
    assert apart(pixels(tmp_path / "together"), pixels(tmp_path / "alone"), 0.5) <= 1


def test_what_each_mode_costs_is_in_the_manifest_and_said(tiny, tmp_path, capsys):
    def costs(name, **options):
        run(config_of(tiny, steps=8, batch_size=2, lambdas=[0.3, 0.7], **options), tmp_path / name)
        records = manifest(tmp_path / name)
        assert all(
            r["seconds"] > 0 and r["timesteps_sha256"] == records[0]["timesteps_sha256"]
            for r in records
        )
        return {r["lam"]: r["evaluations"] for r in records}, records[0]

    exact, record = costs("exact")
    assert exact == pytest.approx({0.3: 2, 0.7: 2 - 2 / 8}), "the first step is shared"
    assert (record["mode"], record["every"], record["particles"], record["ess"]) == (
        "exact",
        None,
        None,
        None,
    )
    said = capsys.readouterr().out
    assert (
        "mode exact: 1.88 evaluations a step" in said
        and "beta_target 2857.14, a KL strength of " in said
    )
    reuse, record = costs("reuse", mode="reuse", every=4)
    assert reuse == pytest.approx({0.3: 1.25, 0.7: 1.25 - 2 / 8}) and (
        record["mode"],
        record["every"],
    ) == ("reuse", 4)
    assert "mode reuse (every 4 steps)" in capsys.readouterr().out
    weights, record = costs("weights", mode="weights")
    assert weights == {0.3: 1, 0.7: 1} and record["path_kl"] is None
    batched, _ = costs("batched", batched=True)
    assert (
        batched == exact
        and apart(pixels(tmp_path / "batched"), pixels(tmp_path / "exact"), 0.3) <= 1
    )


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_sde"])
def test_particles_on_a_flow(tiny, tmp_path, sampler):
    config = config_of(tiny, "flux-lora", particles=2, batch_size=2, sampler=sampler, lambdas=[0.5])
    run(config, tmp_path / "together")
    run(replace(config, batch_size=1, prompts=PROMPTS[::-1]), tmp_path / "alone")
    assert apart(pixels(tmp_path / "together"), pixels(tmp_path / "alone"), 0.5) <= 1
    assert all(1 <= r["ess"] < 2 for r in manifest(tmp_path / "together")), (
        "two chains from unlike noise weigh unlike"
    )


def test_particles_leave_one_image_and_their_sample_size(tiny, tmp_path, capsys):
    config = config_of(tiny, particles=3, batch_size=2, sampler="ddpm", steps=4)
    run(config, tmp_path / "particles")
    run(replace(config, particles=1), tmp_path / "exact")
    records = manifest(tmp_path / "particles")
    assert len(records) == 6 and all(
        r["mode"] == "particles" and r["particles"] == 3 and 1 <= r["ess"] <= 3 for r in records
    )
    assert all(r["path_kl"] is not None for r in records)
    assert all(r["ess"] < 3 for r in records if r["lam"] == 0.5), (
        "three particles that differ weigh unlike"
    )
    said = capsys.readouterr().out
    assert (
        said.count("the weights of particles are a heuristic") == 1
        and "mode particles (3 an image)" in said
    )


def test_the_trust_region_reaches_the_dial(tiny, tmp_path):
    config = config_of(tiny, "sd15-full", lambdas=[1.0, 2.0])
    run(replace(config, trust_region=1e-9), tmp_path / "held")
    run(config, tmp_path / "free")
    held, free = pixels(tmp_path / "held"), pixels(tmp_path / "free")
    at_anchor = {
        name.replace("1.00", "2.00"): image
        for name, image in held.items()
        if name.startswith("lam=1.00")
    }
    assert apart(at_anchor, held, 2.0) <= 2 < apart(at_anchor, free, 2.0)
    assert {r["trust_region"] for r in manifest(tmp_path / "held")} == {1e-9}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"particles": 2, "batch_size": 1},
            "sample: with classifier-free guidance the weights of particles are a heuristic; ",
        ),
        ({"lambdas": [0.5, 2.0]}, "sample: lambda 2 lies beyond the anchor: it extrapolates, "),
    ],
)
def test_the_user_reads_once_and_before_the_first_image_what_realign_would_warn_of(
    tiny, tmp_path, capsys, options, said
):
    config = config_of(tiny, prompts=PROMPTS[:1], steps=2, **options)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run(config, tmp_path)
    assert not [
        w
        for w in warned
        if "deradiff" in w.filename or "beyond" in str(w.message) or "heuristic" in str(w.message)
    ]
    assert capsys.readouterr().out.count(said) == 1


def test_the_defaults_name_samplers_that_exist():
    for name, defaults in SAMPLING_DEFAULTS.items():
        assert SAMPLERS[defaults.sampler].flow == (
            FAMILIES[name].flow if name in FAMILIES else False
        )
