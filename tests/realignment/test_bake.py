"""Baked weights: stock diffusers loads them and samples what mode `weights` samples; what lies
beside them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.models.families import FAMILIES, family_of
from deradiff.realignment.bake import bake
from deradiff.realignment.context import realign
from sample.config import SampleConfig
from sample.stage import run
from tests.support.products import sparse_product
from tests.support.tiny_pipelines import (
    VISIBLE,
    perturbed_denoiser,
    save_tiny,
    tiny_lora,
    tiny_pipeline,
)

LAM = 0.6
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with <family>-base, <family>-full and <family>-lora, and with sd15-dora.

    The alpha of the LoRAs is twice their rank.
    """
    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        base = save_tiny(family, folder / f"{family}-base")
        denoiser = getattr(tiny_pipeline(family), FAMILIES[family].denoiser)
        networks = {
            "full": perturbed_denoiser(denoiser, 0.3),
            "lora": tiny_lora(denoiser, scale=VISIBLE),
        }
        if family == "sd15":
            networks["dora"] = tiny_lora(denoiser, use_dora=True)
        for name, network in networks.items():
            method = "full" if name == "full" else "lora"
            card = AnchorCard(base_model=str(base), family=family, method=method, beta=300.0)
            save_anchor(folder / f"{family}-{name}", network, card)
    return folder


def sample(pipe):
    """Latents of two prompts."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(
        prompt=["a fox", "a cat"],
        generator=generators,
        num_inference_steps=3,
        output_type="latent",
        height=64,
        width=64,
        **{family_of(pipe).guidance_argument: 3.0},
        **dict(family_of(pipe).call_options),
    ).images


@pytest.mark.parametrize(("family", "method"), sparse_product([*FAMILIES], ["lora", "full"]))
def test_stock_diffusers_loads_the_folder_and_samples_mode_weights(tiny, tmp_path, family, method):
    anchor = tiny / f"{family}-{method}"
    folder = bake(anchor, LAM, tmp_path / "baked")
    pipe = tiny_pipeline(family)
    reference = sample(pipe)
    with realign(pipe, anchor, LAM, mode="weights"):
        expected = sample(pipe)
    with realign(pipe, folder, 1.0):
        as_anchor = sample(pipe)

    # As users of diffusers load it.
    if method == "lora":
        pipe.load_lora_weights(folder)
    else:
        denoiser = FAMILIES[family].denoiser
        network_type = type(getattr(pipe, denoiser))
        network = network_type.from_pretrained(folder, subfolder=denoiser)
        setattr(pipe, denoiser, network)
    stock = sample(pipe)

    scale = (expected - reference).abs().max()
    assert scale > 0.05
    assert (stock - expected).abs().max() < 2e-3 * scale
    assert (as_anchor - expected).abs().max() < 2e-3 * scale


def test_a_lora_has_the_names_that_other_programs_read(tiny, tmp_path):
    state = load_file(bake(tiny / "sdxl-lora", LAM, tmp_path / "sdxl") / LORA)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} < set(state)

    # Alpha is the rank: strength 1 is the lambda, also where alpha is not read.
    assert state[f"{layer}.alpha"] == len(state[f"{layer}.lora_down.weight"]) == 4
    trained = load_file(tiny / "sdxl-lora" / LORA)
    up = trained["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"]
    torch.testing.assert_close(state[f"{layer}.lora_up.weight"], LAM * 2 * up)

    for name in load_file(bake(tiny / "flux-lora", LAM, tmp_path / "flux") / LORA):
        assert name.startswith("transformer.")
        assert name.endswith((".lora_A.weight", ".lora_B.weight"))


def test_the_folder_is_an_anchor_that_says_where_it_comes_from(tiny, tmp_path, caplog):
    folder = bake(tiny / "sd15-lora", LAM, tmp_path / "deep/baked")
    card = load_anchor(folder).card
    assert card.beta == pytest.approx(500)
    assert card.method == "lora"
    assert card.objective == "dpo, baked at lam 0.6"
    note = json.loads((folder / "bake.json").read_text())
    assert note["lam"] == LAM
    assert note["anchor"] == str(tiny / "sd15-lora")
    assert len(note["anchor_sha256"]) == 16
    readme = (folder / "README.md").read_text()
    assert "load_lora_weights" in readme
    assert "stands for beta 500" in readme
    assert [path.name for path in folder.parent.iterdir()] == ["baked"], "nothing else is left"

    # The same bake again changes nothing.
    (folder / "bake.json").touch()
    (folder / ".bake.json.7.part").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}
    assert bake(tiny / "sd15-lora", LAM, folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    # A damaged one is named and made again, and what a killed process left is removed.
    whole = (folder / LORA).read_bytes()
    (folder / LORA).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder.parent / f".baked.{2**22 + 1}.part").mkdir()
    bake(tiny / "sd15-lora", LAM, folder)
    assert "and is baked again" in caplog.text
    assert (folder / LORA).read_bytes() == whole
    assert [path.name for path in folder.parent.iterdir()] == ["baked"]


def test_what_cannot_be_baked_is_refused_in_one_sentence(tiny, tmp_path):
    def refused(message, anchor="sd15-lora", lam=LAM, path=tmp_path / "new", **options):
        with pytest.raises(ValueError) as error:
            bake(tiny / anchor, lam, path, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    refused("a number above 0, not 0", lam=0)
    refused("a finite number", lam=float("nan"))
    refused("a number above 0", lam=torch.tensor([0.5, 0.6]))
    refused("is a DoRA", anchor="sd15-dora")
    refused("of family sd15 and the pipeline of sdxl", base=str(tiny / "sdxl-base"))

    # A folder that holds anything else is left as it is.
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    refused("holds something else than this bake", path=mine)
    bake(tiny / "sd15-lora", LAM, tmp_path / "there")
    refused("holds something else than this bake", lam=0.5, path=tmp_path / "there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "there"]
    assert len(list(mine.iterdir())) == 1


def test_the_stage_bakes_samples_and_notes_how_far_it_is_from_exact(tiny, tmp_path, capsys):
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
    for key in ("rms_from_exact", "rms_reference_anchor", "percent_of_distance"):
        value, low, high = compared[key]
        assert 0 < low <= value <= high
    assert compared["rms_from_exact"][0] < compared["rms_reference_anchor"][0]
    assert compared["prompts"] == 3
    assert "How far from mode exact" in (folder / "README.md").read_text()
    assert "% of reference to anchor" in capsys.readouterr().out

    # The baked images are those of an anchor at its own lambda 1.
    lines = (tmp_path / "run-baked0.6/manifest.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 6
    assert all(record["beta"] == pytest.approx(500) for record in records)
    assert all(record["lam"] == 1 for record in records)

    # The same command resumes.
    run(config, tmp_path / "run")
    assert json.loads((folder / "bake.json").read_text())["compared"] == compared
