"""The registry of objectives: what a row promises, its class and the config keep."""

import json
from dataclasses import fields, replace
from inspect import isfunction, signature
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from deradiff.training.objectives.base import AnchorObjective, Objective
from deradiff.training.objectives.registry import OBJECTIVES
from tests.support.fine_tune import FINE_TUNE
from tests.support.train_runs import go
from train.config import DataConfig, HubConfig, ModelConfig, PanelConfig, TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
SECTIONS = {field.name for field in fields(TrainConfig)}


def methods_of(protocol):
    """The public methods of a protocol and of those that it extends."""
    found = {}
    for kind in reversed(protocol.__mro__):
        for name, member in vars(kind).items():
            function = getattr(member, "__func__", member)
            if isfunction(function) and not name.startswith("_"):
                found[name] = function
    return found


@pytest.fixture(params=[*OBJECTIVES, "fine_tune"])
def spec(request):
    """Each row of the registry, and one that is not in it."""
    return FINE_TUNE if request.param == "fine_tune" else OBJECTIVES[request.param]


def test_the_class_of_a_row_has_all_that_the_stage_calls(spec):
    objective = spec.load()
    wanted = methods_of(AnchorObjective if spec.makes_anchor else Objective)
    if not spec.uses_beta:
        wanted.pop("kl_strength", None)
    for name, method in wanted.items():
        assert hasattr(objective, name), f"{spec.implementation} lacks {name}"
        arguments = [p for p in signature(method).parameters if p not in ("self", "cls")]
        given = [p for p in signature(getattr(objective, name)).parameters if p != "self"]
        assert given == arguments, f"the arguments of {spec.implementation}.{name}"


def test_what_a_row_says_fits_together(spec):
    if spec.makes_anchor:
        assert spec.needs_base, "an anchor is aligned from a base model"
        assert spec.trains_denoiser
        assert spec.folder == "anchor"
    if spec.uses_beta:
        assert spec.makes_anchor, "beta belongs to an anchor's card"
    if spec.saves_pipeline:
        assert spec.needs_full, "a pipeline is saved without adapters"
    assert spec.folder == Path(spec.folder).name


def test_the_config_has_the_section_of_a_row(spec):
    wanted = set()
    if spec.uses_beta:
        wanted.add("beta")
    if spec.has_reference:
        wanted.add("reference_errors")
    if spec.section is None:
        assert not wanted, "it uses settings, and has no section for them"
        return
    assert spec.section in SECTIONS, f"TrainConfig has no section {spec.section}"
    section = getattr(TrainConfig(model=ModelConfig(base="x")), spec.section)
    assert wanted <= set(vars(section))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_docs_name_every_objective(name):
    assert f"| `{name}` |" in (DOCS / "training.md").read_text()


def test_a_new_row_is_checked_named_trained_and_saved_as_any_other(
    train_config, base_folder, monkeypatch
):
    monkeypatch.setitem(OBJECTIVES, "fine_tune", FINE_TUNE)
    images = DataConfig(source="shapes_images", count=12)
    config = replace(
        train_config,
        objective="fine_tune",
        data=images,
        panel=PanelConfig(every=2, steps=1, lambdas=[0.0, 1.0]),
    )

    # Its config is checked by what the row says.
    with pytest.raises(ValueError, match="objective=fine_tune learns from captioned images"):
        replace(config, data=train_config.data)
    with pytest.raises(ValueError, match="objective=fine_tune needs a base model"):
        replace(config, model=ModelConfig(base=None))
    assert replace(config, hub=HubConfig("me/it")).run_name() == config.run_name()

    # It trains, and leaves an anchor with a card, a README and panels.
    folder = go(config)
    assert folder == Path(config.runs) / "train/x-fine_tune-lora-seed0/anchor"
    card = json.loads((folder / "anchor.json").read_text())
    assert card["objective"] == "fine_tune"
    assert card["beta"] is None
    assert card["flops"] == 1e9 * 12 * 3
    assert (folder / "README.md").is_file()
    assert (folder / "grid.png").is_file()
    StableDiffusionPipeline.from_pretrained(base_folder).load_lora_weights(folder)
