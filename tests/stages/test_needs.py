"""`deradiff needs`: hours, memory, disk and cost on paper, and the estimate against real peaks."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from deradiff.models.families import FAMILIES
from deradiff.models.gpus import GPU, GPUS
from deradiff.models.published import PUBLISHED_MODELS, PublishedModel
from train.build import base_model
from train.config import DataConfig, ModelConfig
from train.estimate import estimate
from train.needs_config import NeedsConfig, ScaleConfig
from train.scale import Pace, mfu_of, run


def on_machines(config, **scale):
    """The config of a training with machines to compare."""
    known = {field.name: getattr(config, field.name) for field in fields(config)}
    return NeedsConfig(**known, needs=ScaleConfig(**scale))


def table_rows(text):
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_hours_and_costs_by_number_of_gpus(train_config, tmp_path, capsys):
    config = replace(train_config, optim=replace(train_config.optim, pairs_per_step=16))
    cards = ["A100-80GB", "H200"]
    run(on_machines(config, cards=cards, prices=[1.0, 2.0], mfu=0.5, bandwidth=1e9), tmp_path)
    out = capsys.readouterr().out
    rows = [row for row in table_rows(out) if row[0].isdigit()]
    # Two pairs at once: eight GPUs at most.
    assert [(row[0], row[1]) for row in rows] == [("1", "8"), ("2", "4"), ("4", "2"), ("8", "1")]
    assert "50% of the 16-bit peak, as given" in out
    assert "of checkpoints" in out
    assert "A100-80GB: the network takes longer" in out


def test_recorded_passes_take_fewer_hours(train_config, tmp_path):
    plain = on_machines(train_config)
    compiled = replace(plain, model=replace(plain.model, compile=True))
    assert mfu_of(plain) < mfu_of(compiled)
    full = replace(compiled, finetune=replace(compiled.finetune, method="full"))
    assert mfu_of(full) == mfu_of(replace(full, model=plain.model))
    given = replace(compiled, needs=ScaleConfig(mfu=0.5))
    assert mfu_of(given) == 0.5


def test_a_ring_sends_the_gradients_nearly_twice():
    pace = Pace(arithmetic=100.0, message=1.0)
    assert pace.network(1) == 0
    assert pace.network(2) == 1
    assert pace.step(4) == 25 + 1.5
    assert pace.limit == 52
    assert pace.network(52) > 100 / 52
    assert pace.network(50) < 100 / 50


def test_a_card_that_is_too_small_is_told_what_to_set(train_config, tmp_path, capsys, monkeypatch):
    # Without a cache its building is not the peak.
    config = replace(train_config, data=replace(train_config.data, cache=False))
    base = base_model(config)
    found = estimate(config, base, 12).memory
    checkpointing = replace(config.model, gradient_checkpointing=True)
    less = estimate(replace(config, model=checkpointing), base, 12).memory
    assert less < found
    monkeypatch.setitem(GPUS, "small", GPU(100.0, (found + less) / 2, "none"))
    monkeypatch.setitem(GPUS, "tiny", GPU(100.0, 1e3, "none"))
    run(on_machines(config, cards=["small", "tiny"]), tmp_path)
    out = capsys.readouterr().out
    assert "small: set model.gradient_checkpointing=true, for" in out
    assert "tiny: no setting makes it fit" in out


def test_machines_are_checked():
    with pytest.raises(ValueError, match=r"needs.cards"):
        ScaleConfig(cards=["A1000"])
    with pytest.raises(ValueError, match=r"give one price for each card"):
        ScaleConfig(cards=["H200"], prices=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"needs.mfu must lie in \(0, 1\]"):
        ScaleConfig(mfu=11.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_phases_are_counted(family, train_config, bases, monkeypatch):
    config = replace(
        train_config,
        model=ModelConfig(base=str(bases(family)), resolution=64),
        panel=replace(train_config.panel, every=1),
        data=DataConfig(source="shapes_pairs", cache=False),
    )
    found = estimate(config, base_model(config), 12)
    assert found.caching == 0 < found.loop_encoders
    assert found.panel > found.steps.held

    # The steps are the same where the data is in a cache, and are not counted again.
    monkeypatch.setattr("train.estimate.step_requirements", lambda *_: found.steps)
    in_cache = replace(config, data=DataConfig(source="shapes_pairs"))
    cached = estimate(in_cache, base_model(config), 1)
    assert cached.loop_encoders == 0 < cached.caching


def test_published_models_have_their_published_sizes():
    sizes = {"sd15": (83.7e6, [123.1e6]), "sdxl": (83.7e6, [123.1e6, 694.7e6])}
    for name in PUBLISHED_MODELS.values():
        base = PublishedModel(name)
        vae = sum(p.numel() for p in base.describe_vae(torch.float16).parameters())
        texts = []
        for encoder in base.describe_text_encoders(torch.float16):
            texts.append(sum(p.numel() for p in encoder.parameters()))
        assert vae == pytest.approx(sizes[name][0], rel=1e-3)
        assert texts == pytest.approx(sizes[name][1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("full", "adafactor")])
def test_sd15_takes_what_is_estimated(method, optimizer, tmp_path):
    """At its real size on the CPU; AdamW's moments would not fit beside a full fine-tune here."""
    # Freed memory goes back at once, so that the process is as large as its tensors.
    threshold = str(1 << 16)
    malloc = {"MALLOC_MMAP_THRESHOLD_": threshold, "MALLOC_TRIM_THRESHOLD_": threshold}
    command = [sys.executable, "-m", "tests.support.measured_run", tmp_path, method, optimizer]
    result = subprocess.run(command, env=os.environ | malloc, stdout=subprocess.PIPE, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    for phase, counted in found["counted"].items():
        assert counted == pytest.approx(found["measured"][phase], rel=0.15), phase
