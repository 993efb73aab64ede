"""The stages on base models in the files that people have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deradiff
from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import read_card
from sample.config import SampleConfig
from sample.stage import run as sample
from tests.support.sample_stage import read_manifest, save_anchors
from tests.support.tiny_pipelines import save_overflowing, tiny_pipeline
from tests.support.train_runs import go, small_run
from train.config import PanelConfig


def one_step(base, runs, **changes):
    """A run of one step that draws a panel."""
    panel = PanelConfig(every=1, prompts=["a red circle"], lambdas=[0.5], steps=1)
    return replace(small_run(base, runs), steps=1, panel=panel, **changes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_with_fp16_files_alone_is_trained_sampled_and_baked(method, tmp_path):
    base = tmp_path / "base"
    tiny_pipeline("sdxl").to(torch.float16).save_pretrained(base, variant="fp16")
    config = one_step(base, tmp_path / "runs", precision="bf16")
    anchor = go(replace(config, finetune=replace(config.finetune, method=method)))
    assert read_card(anchor).base_model == str(base)
    assert (anchor / "grid.png").is_file(), "a panel"

    config = SampleConfig(
        anchor=str(anchor),
        lambdas=[0.0, 0.5],
        prompts=["a red circle"],
        steps=1,
        tracking=TrackingConfig("none"),
    )
    sample(config, tmp_path / "sampled")
    assert len(read_manifest(tmp_path / "sampled")) == 2
    deradiff.bake(str(anchor), 0.5, tmp_path / "baked")


@pytest.mark.parametrize("stage", ["train", "sample"])
def test_an_incomplete_base_is_refused_before_data_is_read(stage, tmp_path, monkeypatch):
    folder = save_anchors(tmp_path, ["sd15"], scale=0.1)
    base = folder / "sd15-base"
    (base / "text_encoder/model.safetensors").unlink()

    def nothing(*_, **__):
        pytest.fail("data is read, or weights are")

    monkeypatch.setattr("train.stage.make_data", nothing)
    monkeypatch.setattr("sample.stage.load_prompts", nothing)
    message = r"base is not complete: it has no text_encoder/model\.safetensors"
    with pytest.raises(ValueError, match=message):
        if stage == "train":
            go(one_step(base, tmp_path / "runs"))
        else:
            anchor = str(folder / "sd15-lora/anchor")
            sample(SampleConfig(anchor=anchor, prompts=["a fox"]), tmp_path / "sampled")


def test_an_autoencoder_that_overflows_without_saying_so_is_refused(tmp_path):
    base = save_overflowing("sdxl", tmp_path / "base", force_upcast=False)
    message = r"not finite, .* \(precision=bf16, model\.vae=<autoencoder>\)"
    with pytest.raises(ValueError, match=message):
        go(one_step(base, tmp_path / "runs", precision="fp16"))
