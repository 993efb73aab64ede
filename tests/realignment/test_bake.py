"""Baked weights: that stock diffusers loads them and samples what mode `weights` samples, what lies beside them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.models.families import FAMILIES
from deradiff.realignment.bake import bake
from deradiff.realignment.context import realign
from sample.config import SampleConfig
from sample.stage import run
from tests.support.tiny_pipelines import (
    VISIBLE,
    perturbed_denoiser,
    save_tiny,
    tiny_lora,
    tiny_pipeline,
)

LAM = 0.6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """<family>-base, <family>-full, <family>-lora for every family, and sd15-dora; the LoRA's alpha is twice its rank."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        base, denoiser = (
            save_tiny(family, folder / f"{family}-base"),
            getattr(tiny_pipeline(family), FAMILIES[family].denoiser),
        )
        networks = {
            "full": perturbed_denoiser(denoiser, 0.3),
            "lora": tiny_lora(denoiser, scale=VISIBLE),
        }
        networks |= {"dora": tiny_lora(denoiser, use_dora=True)} if family == "sd15" else {}
        for name, network in networks.items():
            card = AnchorCard(
                base_model=str(base),
                family=family,
                method="full" if name == "full" else "lora",
                beta=300.0,
            )
            save_anchor(folder / f"{family}-{name}", network, card)
    return folder


def sampled(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    call = {
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "height": 64,
        "width": 64,
    }
    return pipe(["a fox", "a cat"], generator=generators, **call).images


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_loads_the_folder_and_samples_mode_weights(tiny, tmp_path, family, method):
    anchor, denoiser = tiny / f"{family}-{method}", FAMILIES[family].denoiser
    folder = bake(anchor, LAM, tmp_path / "baked")
    pipe = tiny_pipeline(family)
    reference = sampled(pipe)
    with realign(pipe, anchor, LAM, mode="weights"):
        wanted = sampled(pipe)
    with realign(pipe, folder, 1.0):
        again = sampled(pipe)
    if method == "lora":
        pipe.load_lora_weights(folder)
    else:
        setattr(
            pipe,
            denoiser,
            type(getattr(pipe, denoiser)).from_pretrained(folder, subfolder=denoiser),
        )
    stock, scale = sampled(pipe), (wanted - reference).abs().max()
    assert scale > 0.05
    assert (stock - wanted).abs().max() < 2e-3 * scale and (
        again - wanted
    ).abs().max() < 2e-3 * scale


def test_a_lora_has_the_names_that_other_programs_read(tiny, tmp_path):
    state = load_file(
        bake(tiny / "sdxl-lora", LAM, tmp_path / "sdxl") / "pytorch_lora_weights.safetensors"
    )
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} < set(state)
    assert state[f"{layer}.alpha"] == len(state[f"{layer}.lora_down.weight"]) == 4, (
        "strength 1 is the lambda, also where alpha is not read"
    )
    trained = load_file(tiny / "sdxl-lora/pytorch_lora_weights.safetensors")
    up = trained["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"]
    torch.testing.assert_close(state[f"{layer}.lora_up.weight"], LAM * 2 * up)
    flow = load_file(
        bake(tiny / "flux-lora", LAM, tmp_path / "flux") / "pytorch_lora_weights.safetensors"
    )
    assert all(
        key.startswith("transformer.") and key.endswith((".lora_A.weight", ".lora_B.weight"))
        for key in flow
    )


def test_the_folder_is_an_anchor_that_says_where_it_comes_from(tiny, tmp_path):
    folder = bake(tiny / "sd15-lora", LAM, tmp_path / "deep/baked")
    card, note = load_anchor(folder).card, json.loads((folder / "bake.json").read_text())
    assert (
        card.beta == pytest.approx(500)
        and card.method == "lora"
        and card.objective == "dpo, baked at lam 0.6"
    )
    assert (
        note["lam"] == LAM
        and note["anchor"] == str(tiny / "sd15-lora")
        and len(note["anchor_sha256"]) == 16
    )
    assert (
        "load_lora_weights" in (folder / "README.md").read_text()
        and "stands for beta 500" in (folder / "README.md").read_text()
    )
    assert [p.name for p in folder.parent.iterdir()] == ["baked"], "nothing else is left"
    (folder / "bake.json").touch()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert bake(tiny / "sd15-lora", LAM, folder) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before, "the same bake is there"


def test_what_cannot_be_baked_is_refused_in_one_sentence(tiny, tmp_path):
    def refused(said, anchor="sd15-lora", lam=LAM, path=tmp_path / "new", **options):
        with pytest.raises(ValueError) as error:
            bake(tiny / anchor, lam, path, **options)
        assert said in str(error.value) and "\n" not in str(error.value), str(error.value)

    refused("a number above 0, not 0", lam=0)
    refused("a finite number", lam=float("nan"))
    refused("a number above 0", lam=torch.tensor([0.5, 0.6]))
    refused("is a DoRA", anchor="sd15-dora")
    refused("of family sd15 and the pipeline of sdxl", base=str(tiny / "sdxl-base"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    refused("holds something else than this bake", path=tmp_path / "mine")
    bake(tiny / "sd15-lora", LAM, tmp_path / "there")
    refused("holds something else than this bake", lam=0.5, path=tmp_path / "there")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["mine", "there"]
        and len(list((tmp_path / "mine").iterdir())) == 1
    )


def test_the_stage_bakes_samples_and_notes_how_far_it_is_from_exact(tiny, tmp_path, capsys):
    from configs.tracking import TrackingConfig

    config = SampleConfig(
        anchor=str(tiny / "sd15-full"),
        lambdas=[LAM],
        prompts=["a fox", "a cat", "a cow"],
        seeds=[0, 1],
        steps=3,
        guidance_scale=3.0,
        bake=str(tmp_path / "baked"),
        tracking=TrackingConfig("none"),
    )
    run(config, tmp_path / "run")
    folder = Path(config.bake)
    compared = json.loads((folder / "bake.json").read_text())["compared"]
    for value, low, high in (
        compared[key] for key in ("rms_from_exact", "rms_reference_anchor", "percent_of_distance")
    ):
        assert 0 < low <= value <= high
    assert (
        compared["rms_from_exact"][0] < compared["rms_reference_anchor"][0]
        and compared["prompts"] == 3
    )
    assert (
        "How far from mode exact" in (folder / "README.md").read_text()
        and "% of reference to anchor" in capsys.readouterr().out
    )
    baked = [
        json.loads(line)
        for line in (tmp_path / "run-baked0.6/manifest.jsonl").read_text().splitlines()
    ]
    assert len(baked) == 6 and all(r["beta"] == pytest.approx(500) and r["lam"] == 1 for r in baked)
    run(config, tmp_path / "run")
    assert json.loads((folder / "bake.json").read_text())["compared"] == compared, (
        "the same command resumes"
    )
