"""The registry of modes: what a row promises, its class keeps; and all that a new mode needs."""

import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.sample import timed_options
from deradiff.realignment.context import realign
from deradiff.realignment.modes import Mode
from deradiff.realignment.registry import (
    LABELS,
    MODES,
    NEEDS,
    SETTINGS,
    full_name,
    label_of,
    unsupported_option,
)
from sample.config import SampleConfig
from sample.sampling import mode_options
from tests.support.realign_world import sample
from tests.support.toy_mode import DAMPED

DOCS = Path(__file__).parents[2] / "docs"
EVERY = 3
STEPS = 12


def test_the_registry_is_read_without_torch():
    code = "import sys, deradiff.realignment.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", MODES)
def test_the_class_of_a_row_is_a_mode_of_its_own(name):
    classes = [spec.load() for spec in MODES.values()]
    assert issubclass(MODES[name].load(), Mode)
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("name", MODES)
def test_a_step_costs_as_many_evaluations_as_the_row_says(sd15, name):
    counts = {"2": 2.0, "1 + 1/k": 1 + 1 / EVERY, "1": 1.0}
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, mode=name, every=EVERY) as dial:
        sample(sd15.pipe, num_inference_steps=STEPS)
    assert dial.evaluations == pytest.approx(counts[MODES[name].evaluations])
    assert bool(dial.path_kl.isfinite().all()) == MODES[name].measures_path_kl


@pytest.mark.parametrize("name", MODES)
def test_what_a_row_goes_together_with_is_taken_and_the_rest_is_refused(sd15, name):
    spec = MODES[name]
    options = {"particles": 2, "batched": True, "trust_region": 1.0}
    assert options.keys() == NEEDS.keys()
    for option, value in options.items():
        enter = partial(realign, sd15.pipe, sd15.anchors["lora1"], 0.5, name, **{option: value})
        config = {"anchor": "x", "mode": name, option: value}
        if getattr(spec, option):
            SampleConfig(**config)
            with enter():
                pass
            continue
        with pytest.raises(ValueError, match=f"{option} needs .*, not '{name}'"):
            enter()
        with pytest.raises(ValueError, match=f"{option} needs .* give mode=.*, not {name}"):
            SampleConfig(**config)

    both = [sd15.anchors["lora1"], sd15.anchors["lora2"]]
    if spec.several_anchors:
        with realign(sd15.pipe, both, [0.5, 0.2], mode=name):
            sample(sd15.pipe, num_inference_steps=1)
    else:
        with (
            pytest.raises(ValueError, match=f"mode {name} is for one anchor"),
            realign(sd15.pipe, both, [0.5, 0.2], mode=name),
        ):
            pass


@pytest.mark.parametrize("name", MODES)
def test_a_users_own_lora_acts_on_a_full_anchor_too(sd15, name):
    stock = sd15.stock("full1")
    for pipe in (sd15.pipe, stock):
        pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    with realign(sd15.pipe, sd15.anchors["full1"], 1, mode=name):
        images = sample(sd15.pipe, num_inference_steps=1)
    torch.testing.assert_close(images, sample(stock, num_inference_steps=1), rtol=0, atol=1e-5)


def test_the_docs_say_what_goes_together():
    page = (DOCS / "modes.md").read_text()
    table = page.partition("## What goes together")[2].partition("##")[0]
    columns = [*NEEDS, "several_anchors"]
    for name, spec in MODES.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        documented = [cell.startswith("yes") for cell in cells]
        assert documented == [getattr(spec, column) for column in columns], name


def test_the_first_option_that_does_not_fit_is_named():
    assert unsupported_option("exact", 4, True, 1.0) is None
    assert unsupported_option("weights", 1, False, None) is None
    assert unsupported_option("weights", 1, True, 1.0) == "batched"


def test_every_mode_has_a_line_style_of_its_own():
    styles = [label.line_style for label in LABELS.values()]
    assert len(set(styles)) == len(styles)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_an_argument_and_a_key_of_the_config(setting):
    (label,) = [label for label in LABELS.values() if label.setting == setting]
    assert "{}" in label.setting_text
    default = inspect.signature(realign).parameters[setting].default
    assert getattr(SampleConfig(anchor="x"), setting) == default


@pytest.mark.parametrize("name", LABELS)
def test_the_name_of_a_mode_says_what_makes_it_another_model(name):
    setting = LABELS[name].setting
    record = dict.fromkeys(SETTINGS) | {"mode": name, "trust_region": None}
    assert full_name(record) == name
    assert full_name(record | {"trust_region": 0.5}) == f"{name} within 0.5 nats"
    assert full_name(record | {"branch": "conditional"}) == f"{name} conditional branch"
    if setting:
        assert full_name(record | {setting: 4}) == f"{name} 4"
    assert label_of(f"{name} 4") == LABELS[name]


def test_a_new_row_is_sampled_checked_named_and_shown_as_any_other(sd15, monkeypatch):
    monkeypatch.setitem(MODES, "damped", DAMPED)
    monkeypatch.setitem(LABELS, "damped", DAMPED.label)
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5) as dial:
        expected = sample(sd15.pipe)
    with realign(sd15.pipe, sd15.anchors["lora1"], 1.0, mode="damped", batched=True) as dial:
        assert (sample(sd15.pipe) - expected).abs().max() < 1e-4
        assert dial.evaluations == 2
    with (
        pytest.raises(ValueError, match="use mode='exact' or mode='reuse', not 'damped'"),
        realign(sd15.pipe, sd15.anchors["lora1"], 1.0, mode="damped", trust_region=1.0),
    ):
        pass

    # The stage takes it, and the manifest and figures name it with its setting.
    config = SampleConfig(anchor="x", mode="damped", every=3, sampler="ddim")
    assert "-damped3-" in config.run_name()
    options = {"every": 3, "particles": None, "trust_region": None, "branch": None}
    assert mode_options(config) == options | {"lam_schedule": None}
    record = mode_options(config) | {"mode": config.mode_name}
    assert full_name(record) == "damped 3"
    assert label_of("damped 3") is DAMPED.label


def test_a_mode_of_another_version_is_shown_too():
    assert label_of("faster 3").line_style == ":"


@pytest.mark.parametrize("name", MODES)
def test_the_docs_the_docstring_and_the_benchmark_have_every_mode(name):
    assert re.search(rf"- `{name}` ", str(realign.__doc__)), "the docstring of realign"
    for page in ("dial.md", "modes.md"):
        rows = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| `")]
        assert any(row.startswith(f"| `{name}`") for row in rows), page
        cost = [row for row in rows if f"| {MODES[name].evaluations} " in row]
        assert any(row.startswith(f"| `{name}`") for row in cost), f"its cost in {page}"
    timed = [options["mode"] for options in timed_options().values()]
    assert name in timed
