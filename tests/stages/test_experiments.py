"""The shipped recipes: each composes, is a config that training would start with, and says what recipes.md says."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import deradiff.training.dpo
from train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
BETAS = (500, 1000, 2000, 5000, 8000, 10000)


def composed(*overrides):
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return OmegaConf.to_object(compose("train", [*overrides]))


def rate(config, gpus):
    o = config.optim
    return deradiff.training.dpo.learning_rate(
        o.lr, o.rule, config.dpo.beta, o.batch_size * o.accumulation * gpus if o.per_pair else 1
    )


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONFIGS / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name):
    assert composed(f"experiment={name}").run_name()


@pytest.mark.parametrize(
    "model, optimizer, warmup, resolution",
    [("sd15", "adamw", 500, 512), ("sdxl", "adafactor", 200, 1024)],
)
def test_the_launchers_recipe(model, optimizer, warmup, resolution):
    config = composed(f"experiment={model}_full")
    o = config.optim
    assert (o.name, o.warmup, o.decay, o.weight_decay, o.clip) == (
        optimizer,
        warmup,
        "constant",
        1e-2,
        1.0,
    )
    assert (config.steps, 16 * o.batch_size * o.accumulation, config.model.resolution) == (
        2000,
        2048,
        resolution,
    )
    assert (config.dpo.beta, config.data.caption_dropout) == (5000, 0.2) and rate(
        config, 16
    ) == pytest.approx(2.048e-5)
    assert config.model.gradient_checkpointing == (model == "sdxl")


@pytest.mark.parametrize("model, beta", [("sd15", 2000), ("sdxl", 5000)])
def test_the_papers_recipe(model, beta):
    config = composed(f"experiment={model}_full_paper")
    assert (
        config.dpo.beta == beta
        and rate(config, 16) == pytest.approx(2000 / beta * 2.048e-8)
        and config.optim.warmup == 0.25 * config.steps
    )


@pytest.mark.parametrize(
    "name",
    ["sd15_full", "sd15_lora", "sd15_full_paper", "sdxl_full", "sdxl_lora", "sdxl_full_paper"],
)
def test_each_beta_is_one_override_and_a_run_of_its_own(name):
    configs = [composed(f"experiment={name}", f"dpo.beta={beta}") for beta in BETAS]
    assert [c.dpo.beta for c in configs] == list(BETAS) and len(
        {c.run_name() for c in configs}
    ) == 6
    ratio = rate(configs[0], 16) / rate(configs[-1], 16)
    assert ratio == pytest.approx(1.0 if name in ("sd15_full", "sdxl_full") else 20.0)
