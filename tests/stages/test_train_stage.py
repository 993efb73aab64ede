"""`python -m train` as a user types it: what it leaves behind, what resumes it, and what it refuses."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import read_card
from deradiff.worlds import shapes
from tests.support.train_runs import go
from train.__main__ import main
from train.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
)


def test_a_lora_anchor_loads_in_stock_diffusers_with_its_alpha(train_config, base_folder):
    folder = go(train_config)
    assert folder.parent.name == "x-dpo-lora-beta500-seed0"
    card = json.loads((folder / "anchor.json").read_text())
    wanted = {
        "base_model": str(base_folder),
        "family": "sd15",
        "method": "lora",
        "beta": 500.0,
        "beta_convention": "mean-half",
    }
    wanted |= {"steps": 3, "pairs_seen": 12, "seed": 0}
    assert {k: card[k] for k in wanted} == wanted and card["flops"] > 0 and card["gpu_hours"] > 0
    pipe = StableDiffusionPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(folder)
    layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_alpha"))
    assert next(iter(layer.lora_alpha.values())) == 8 and next(iter(layer.r.values())) == 4
    assert any(p.abs().max() > 0 for n, p in pipe.unet.named_parameters() if "lora_B" in n)
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "loss",
        "implicit_accuracy",
        "margin",
        "model_mse",
        "reference_mse",
        "lr",
        "grad_norm",
        "pairs_per_second",
    }
    assert (
        keys <= set(rows[0])
        and rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        and rows[0]["lr"] == pytest.approx(1e-3 * 2000 / 500)
    )


def test_a_full_anchor_is_a_unet_folder_and_the_base_is_untouched(train_config, base_folder):
    folder = go(replace(train_config, finetune=FinetuneConfig(method="full")))
    trained, stock = (
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        UNet2DConditionModel.from_pretrained(base_folder / "unet"),
    )
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), stock.parameters()))
    assert read_card(str(folder)).method == "full"


def test_a_mistake_in_the_data_does_not_claim_the_run_directory(train_config, tmp_path):
    wrong = replace(
        train_config, data=DataConfig(source="table", path=str(tmp_path / "nowhere.parquet"))
    )
    with pytest.raises(ValueError, match="does not exist"):
        go(wrong)
    assert go(train_config).is_dir()


def test_the_same_command_resumes_and_another_config_is_refused(train_config, capsys):
    folder = go(train_config)
    before = load_file(folder / "pytorch_lora_weights.safetensors")
    stamp = (folder / "anchor.json").stat().st_mtime_ns
    assert (
        go(replace(train_config, tracking=TrackingConfig(kind="none", project="other"))) == folder
    )
    assert (
        f"is finished: see {folder}" in capsys.readouterr().out
        and (folder / "anchor.json").stat().st_mtime_ns == stamp
    )
    after = load_file(folder / "pytorch_lora_weights.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    with pytest.raises(
        ValueError, match=r"holds a run of another config: steps \(3 there, 5 here\)"
    ):
        go(replace(train_config, steps=5))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_starts_at_the_reference_too(train_config, method):
    folder = go(
        replace(
            train_config, precision="bf16", finetune=replace(train_config.finetune, method=method)
        )
    )
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert (
        rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
        and rows[0]["implicit_accuracy"] == 0.5
        and len(rows) == 3
    )


def test_training_does_not_depend_on_the_cache(train_config):
    cached = go(train_config)
    plain = go(replace(train_config, name="plain", data=replace(train_config.data, cache=False)))
    a, b = (load_file(f / "pytorch_lora_weights.safetensors") for f in (cached, plain))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_from_captioned_images_to_an_anchor(train_config, tmp_path):
    """The whole road of the docs page: CLIP, autoencoder, base model, scored pairs, anchor."""
    shapes.write_images(tmp_path / "pictures.parquet", 24, seed=0)
    images = DataConfig(source="table", path=str(tmp_path / "pictures.parquet"))
    fresh = ModelConfig(name="tiny", base=None, resolution=32, channels=[16, 32], clip_width=32)
    small = replace(train_config, objective="contrastive", model=fresh, data=images, steps=2)
    clip = go(small)
    vae = go(replace(small, objective="autoencoder", optim=replace(train_config.optim, ema=0.9)))
    whole = replace(train_config.finetune, method="full")
    pipeline = go(
        replace(
            small,
            objective="pretrain",
            finetune=whole,
            model=replace(fresh, clip=str(clip), vae=str(vae)),
        )
    )
    scored = DataConfig(
        source="scored_pairs", path=images.path, count=8, scorer="clip", scorer_checkpoint=str(clip)
    )
    anchor = go(
        replace(
            train_config,
            model=ModelConfig(name="mine", base=str(pipeline), resolution=32),
            data=scored,
        )
    )
    scorer = go(
        replace(small, objective="preference", model=replace(fresh, clip=str(clip)), data=scored)
    )
    assert (anchor / "anchor.json").is_file() and (scorer / "model.safetensors").is_file()
    picture = StableDiffusionPipeline.from_pretrained(pipeline)(
        shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32
    ).images[0]
    assert picture.size == (32, 32)


@pytest.mark.parametrize(
    "typed, said",
    [
        (["dpo.bta=1"], "dpo.bta"),
        (["dpo.beta=strong"], "dpo.beta"),
        (["dpo.beta=0"], "dpo.beta must be above 0, not 0.0"),
        (
            ["objective=pretrain"],
            "objective=pretrain learns from captioned images, which data.source=shapes_pairs does not give",
        ),
        (["model.base=runs/nowhere"], "there is no pipeline folder runs/nowhere"),
        (["model=tiny"], "objective=dpo needs a base model"),
        (["objective=pretrain", "data=shapes_images"], "add finetune=full"),
        (["data.scorer=colourful"], "labelled by vivid or crisp, not 'colourful'"),
        (
            ["model.vae=nowhere", "model.base={base}"],
            "model.vae=nowhere is no autoencoder's folder",
        ),
        (
            ["runs=/dev/null/runs", "model.base={base}"],
            "cannot be written, because of /dev/null: give runs=",
        ),
        (
            ["data=table", "data.path=nowhere.parquet", "model.base={base}"],
            "data.path nowhere.parquet does not exist",
        ),
        (["model.resolution=30"], "model.resolution must be a multiple of 8, not 30"),
        (["finetune.method=dora"], "finetune.method must be one of lora, full, not 'dora'"),
        (
            ["finetune.targets=[to_q,to_z]", "model.base={base}"],
            "finetune.targets: to_z matches no layer of {base}; those of",
        ),
        (
            ["optim.name=adamw8bit_torchao"],
            "adamw8bit_torchao needs a package that is not installed: type pip install torchao",
        ),
        (["hub.push_to=me"], "hub.push_to=me names no hub repository: give user/name"),
        (
            ["hub.push_to=me/it"],
            "hub.push_to=me/it needs an account: type hf auth login, or set HF_TOKEN",
        ),
        (["dpo.lr=1"], "Key 'lr' not in 'DPOConfig' (dpo.lr); did you mean optim.lr?"),
        (["finetune.targets=to_q"], "finetune.targets is a list: give finetune.targets=[to_q]"),
        (["tracking.mode=off"], "tracking.mode must be online or offline"),
        (["steps=0"], "steps must be above 0"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(
    typed, said, base_folder, tmp_path, monkeypatch, capsys
):
    typed, said = [t.format(base=base_folder) for t in typed], said.format(base=base_folder)
    monkeypatch.setattr(
        "deradiff.models.base_model.BaseModel.load_pipeline",
        lambda *_, **__: pytest.fail("a weight was loaded"),
    )
    with pytest.raises(SystemExit) as stop:
        type_here(["train", "tracking=none", f"runs={tmp_path}", "cpu=true", *typed], monkeypatch)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2 and err.startswith("train: ") and said in err and err.count("\n") == 1
    ), err
    assert not list(tmp_path.glob("train/*"))


def test_the_help_lists_every_key_with_its_meaning_and_the_groups_with_their_choices(
    monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    main()
    out = capsys.readouterr().out
    assert (
        "  finetune=full | lora\n" in out
        and "  tracking=none | tensorboard | wandb\n" in out
        and "scorers=" not in out
    )
    lines = {line.split("=")[0].strip(): line for line in out.splitlines() if "=" in line}
    assert (
        lines["dpo.beta"].split(maxsplit=1)
        == ["dpo.beta=2000.0", lines["dpo.beta"].split(maxsplit=1)[1]]
        and "KL strength" in out
    )
    assert {
        "optim.lr",
        "finetune.targets",
        "panel.every",
        "hub.push_to",
        "keep_best",
        "data.path",
    } <= lines.keys()


def command(config_overrides, base_folder, tmp_path, *prefix):
    typed = [
        f"model.base={base_folder}",
        "model.resolution=64",
        "data.count=16",
        "tracking=none",
        f"runs={tmp_path}",
        "optim.lr=1e-3",
        "cpu=true",
        "panel.every=0",
    ]
    return [sys.executable, "-m", *prefix, "train", *typed, *config_overrides]


def lora(tmp_path, name):
    return load_file(tmp_path / "train" / name / "anchor" / "pytorch_lora_weights.safetensors")


def type_here(command, monkeypatch):
    """The command of another process, in this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("sys.argv", command[command.index("train") :])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it: so that it is unset again
    main()


def test_a_run_that_is_killed_in_the_middle_ends_as_if_it_had_not_been(
    base_folder, tmp_path, monkeypatch
):
    typed = ["steps=30", "checkpoint_every=3", "log_every=3", "optim.batch_size=2"]
    type_here(command([*typed, "name=whole"], base_folder, tmp_path), monkeypatch)
    process = subprocess.Popen(
        command([*typed, "name=killed"], base_folder, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "train/killed/checkpoints"
    while not (checkpoints / "step-000006").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "train/killed/anchor").exists(), "it ended before it was killed"
    type_here(command([*typed, "name=killed"], base_folder, tmp_path), monkeypatch)
    whole, killed = lora(tmp_path, "whole"), lora(tmp_path, "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    rows = [
        json.loads(line)["step"]
        for line in (tmp_path / "train/killed/metrics.jsonl").read_text().splitlines()
    ]
    assert rows == list(range(3, 31, 3))


@pytest.mark.slow
def test_two_ranks_of_the_command_end_as_one(base_folder, tmp_path):
    typed = ["steps=6", "log_every=1"]
    ranks = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    two, one = (
        [*typed, "name=two", "optim.batch_size=2"],
        [*typed, "name=one", "optim.batch_size=4"],
    )
    subprocess.run(
        command(two, base_folder, tmp_path, *ranks), check=True, capture_output=True, timeout=300
    )
    subprocess.run(
        command(one, base_folder, tmp_path), check=True, capture_output=True, timeout=300
    )
    two, one = lora(tmp_path, "two"), lora(tmp_path, "one")
    for key in one:
        # AdamW divides by the gradient's own size: where that is nearly 0, the order of a sum shows
        assert (two[key] - one[key]).norm() < 5e-3 * one[key].norm(), key
