"""The train stage and the dial on the families that the other tests of stages do not train: an
anchor from images and captions to images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deradiff.anchors.anchor import read_card
from deradiff.models.base_model import BaseModel
from deradiff.models.families import FAMILIES
from deradiff.realignment.context import realign
from tests.support.tiny_pipelines import EVERY_KIND
from tests.support.train_runs import go, small_run
from train.config import PanelConfig

NEW = [name for name in FAMILIES if name not in EVERY_KIND]


def trained(base, runs, method):
    """The folder of an anchor after one step, with a learning rate that is seen in images."""
    config = small_run(base, runs)
    panel = PanelConfig(every=1, prompts=["a red circle"], lambdas=[0.5], steps=1)
    return go(
        replace(
            config,
            model=replace(config.model, gradient_checkpointing=True),
            finetune=replace(config.finetune, method=method),
            optim=replace(config.optim, lr=0.05, pairs_per_step=2, warmup=0),
            data=replace(config.data, count=2),
            panel=panel,
            precision="bf16",
            steps=1,
        )
    )


def sample(pipe, name):
    """Latents of two prompts of unlike lengths, without guidance."""
    family = FAMILIES[name]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {family.guidance_argument: family.no_guidance, **dict(family.call_options)}
    return pipe(
        prompt=["a cat", "two red dogs"],
        height=64,
        width=64,
        num_inference_steps=2,
        generator=generators,
        output_type="latent",
        **options,
    ).images


def test_qwen_image_samples_the_pairs_that_it_is_trained_on(bases, tmp_path):
    """It is guided by an argument of its own, with a negative prompt for each caption."""
    base = bases("qwen_image")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na green square\n")
    config = small_run(base, tmp_path / "runs")
    data = replace(
        config.data,
        source="sampled_pairs",
        prompts=str(prompts),
        scorer="colourful",
        count=4,
        steps=1,
        guidance_scale=4.0,
    )
    anchor = go(replace(config, data=data, steps=1))
    assert read_card(anchor).steps == 1


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", NEW)
def test_an_anchor_is_trained_loads_in_stock_diffusers_and_is_dialled(
    name, method, bases, tmp_path
):
    base = bases(name)
    anchor = trained(base, tmp_path / "runs", method)
    card = read_card(anchor)
    assert (card.family, card.method, card.steps) == (name, method, 1)
    assert card.flops > 0
    assert (anchor / "grid.png").is_file(), "a panel"

    # The ends are the stock pipelines, to the bit; the middle is between them
    pipe = BaseModel(str(base)).load_pipeline()
    stock = BaseModel(str(base)).load_pipeline()
    if method == "lora":
        stock.load_lora_weights(anchor)
    else:
        network = type(stock.transformer).from_pretrained(anchor, subfolder="transformer")
        stock.register_modules(transformer=network)
    reference = sample(pipe, name)
    aligned = sample(stock, name)
    distance = (aligned - reference).norm()
    assert distance > 1e-3 * reference.norm()
    with realign(pipe, anchor, lam=0) as dial:
        assert torch.equal(sample(pipe, name), reference)
        dial.lam = 1
        assert torch.equal(sample(pipe, name), aligned)
        dial.lam = 0.5
        middle = sample(pipe, name)
    assert (middle - (reference + aligned) / 2).norm() < 0.2 * distance
    assert torch.equal(sample(pipe, name), reference)
