"""Every set of settings composes with every other, and the recipes say what was published."""

import functools
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from deradiff.training.dpo import learning_rate
from sample.config import SampleConfig
from tests.support.products import sparse_product
from train.config import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
BETAS = (500, 10000)
PUBLISHED_GPUS = 16


def choices(group):
    """The names that a config group offers."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


@functools.cache
def store_schema(stage, schema):
    """Make a config known to Hydra."""
    ConfigStore.instance().store(name=f"{stage}_schema", node=schema)


def composed(*overrides, stage="train", schema=TrainConfig):
    """What a stage would get from these overrides, all checks of its config passed."""
    store_schema(stage, schema)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return OmegaConf.to_object(compose(stage, [*overrides]))


def rate(config):
    """The learning rate of a step."""
    optim = config.optim
    pairs = optim.pairs_per_step if optim.per_pair else 1
    return learning_rate(optim.lr, optim.rule, config.dpo.beta, pairs)


@pytest.mark.parametrize("model, method", product(choices("model"), choices("finetune")))
def test_every_model_composes_with_every_finetune(model, method):
    # A new model has no base to align: it is pretrained.
    new = ["objective=pretrain", "finetune=full", "data=shapes_images"]
    new += ["model.clip=clip", "model.vae=vae"]
    config = composed(f"model={model}", f"finetune={method}", *(new if model == "tiny" else []))
    assert config.model.name == model
    assert config.finetune.method == method or model == "tiny"
    assert config.run_name()


@pytest.mark.parametrize("method", choices("finetune"))
def test_a_model_without_a_recipe_takes_the_general_settings(method):
    config = composed(f"finetune={method}", f"optim={method}", "model.name=mine")
    assert config.run_name() == f"mine-dpo-{method}-beta2000-seed0"
    assert config.steps == 2000


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment):
    assert composed(f"experiment={experiment}").run_name()


@pytest.mark.parametrize(
    "model, experiment", sparse_product(choices("model"), choices("experiment"))
)
def test_an_experiment_can_be_run_on_another_model(model, experiment):
    store_schema("train", TrainConfig)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        for method in choices("finetune"):
            overrides = [f"experiment={experiment}", f"model={model}", f"finetune={method}"]
            assert compose("train", overrides).model.name == model


@pytest.mark.parametrize(
    "model, mode", sparse_product(choices("model"), ["exact", "weights", "reuse"])
)
def test_every_model_composes_with_every_mode_of_sampling(model, mode):
    config = composed(
        f"model={model}", f"mode={mode}", "anchor=a", stage="sample", schema=SampleConfig
    )
    assert config.mode == mode
    assert config.run_name()


@pytest.mark.parametrize(
    "model, optimizer, warmup, resolution",
    [("sd15", "adamw", 500, 512), ("sdxl", "adafactor", 200, 1024)],
)
def test_the_launchers_recipe(model, optimizer, warmup, resolution):
    config = composed(f"experiment={model}_full")
    optim = config.optim
    assert (optim.name, optim.warmup, optim.decay) == (optimizer, warmup, "constant")
    assert (optim.weight_decay, optim.clip) == (1e-2, 1.0)
    assert config.steps == 2000
    assert optim.pairs_per_step == 2048
    assert optim.shares(PUBLISHED_GPUS).accumulation == 128
    assert config.model.resolution == resolution
    assert config.dpo.beta == 5000
    assert config.data.caption_dropout == 0.2
    assert rate(config) == pytest.approx(2.048e-5)
    assert config.model.gradient_checkpointing == (model == "sdxl")


@pytest.mark.parametrize("model, beta", [("sd15", 2000), ("sdxl", 5000)])
def test_the_papers_recipe(model, beta):
    config = composed(f"experiment={model}_full_paper")
    assert config.dpo.beta == beta
    assert rate(config) == pytest.approx(2000 / beta * 2.048e-8)
    assert config.optim.warmup == 0.25 * config.steps


@pytest.mark.parametrize(
    "name",
    ["sd15_full", "sd15_lora", "sd15_full_paper", "sdxl_full", "sdxl_lora", "sdxl_full_paper"],
)
def test_each_beta_is_one_override_and_a_run_of_its_own(name):
    configs = [composed(f"experiment={name}", f"dpo.beta={beta}") for beta in BETAS]
    assert tuple(config.dpo.beta for config in configs) == BETAS
    assert configs[0].run_name() != configs[1].run_name()
    ratio = rate(configs[0]) / rate(configs[-1])
    assert ratio == pytest.approx(1.0 if name in ("sd15_full", "sdxl_full") else 20.0)


def test_anchors_of_other_rewards_are_runs_of_their_own():
    names = {}
    for scorer in ("vivid", "crisp", "{vivid:0.25,crisp:0.75}"):
        names[scorer] = composed(f"data.scorer={scorer}").run_name()
    assert list(names.values()) == [
        "shapes-dpo-lora-beta2000-seed0",
        "shapes-dpo-lora-beta2000-crisp-seed0",
        "shapes-dpo-lora-beta2000-crisp0.75-vivid0.25-seed0",
    ]
