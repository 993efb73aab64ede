"""`python -m train` as a user types it: what it leaves, what resumes it, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from typing import get_type_hints

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import read_card
from deradiff.training.objectives.diffusion import DPO
from deradiff.worlds import shapes
from tests.support.processes import start
from tests.support.train_runs import go
from train.__main__ import main
from train.config import DataConfig, FinetuneConfig, ModelConfig, PanelConfig, TrainConfig

LORA = "pytorch_lora_weights.safetensors"


def metrics(run_dir):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_equal(first, second):
    """Two sets of tensors are equal to the bit."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_lora_anchor_loads_in_stock_diffusers_with_its_alpha(train_config, base_folder):
    folder = go(train_config)
    assert folder.parent.name == "x-dpo-lora-beta500-seed0"

    # Its card.
    card = json.loads((folder / "anchor.json").read_text())
    expected = {
        "base_model": str(base_folder),
        "family": "sd15",
        "method": "lora",
        "beta": 500.0,
        "beta_convention": "mean-half",
        "steps": 3,
        "pairs_seen": 12,
        "seed": 0,
    }
    assert {key: card[key] for key in expected} == expected
    assert card["flops"] > 0
    assert card["gpu_hours"] > 0

    # Its weights.
    pipe = StableDiffusionPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(folder)
    layer = next(module for module in pipe.unet.modules() if hasattr(module, "lora_alpha"))
    assert next(iter(layer.lora_alpha.values())) == 8
    assert next(iter(layer.r.values())) == 4
    trained = [p for name, p in pipe.unet.named_parameters() if "lora_B" in name]
    assert any(p.abs().max() > 0 for p in trained)

    # Its metrics.
    first = metrics(folder.parent)[0]
    assert {
        "step",
        "loss",
        "implicit_accuracy",
        "margin",
        "model_mse",
        "reference_mse",
        "lr",
        "grad_norm",
        "pairs_per_second",
    } <= set(first)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["lr"] == pytest.approx(1e-3 * 2000 / 500)


def test_a_full_anchor_is_a_unet_folder_and_the_base_is_untouched(train_config, base_folder):
    folder = go(replace(train_config, finetune=FinetuneConfig(method="full")))
    trained = UNet2DConditionModel.from_pretrained(folder / "unet")
    stock = UNet2DConditionModel.from_pretrained(base_folder / "unet")
    pairs = zip(trained.parameters(), stock.parameters())
    assert any(not torch.equal(after, before) for after, before in pairs)
    assert read_card(str(folder)).method == "full"


def test_a_mistake_in_the_data_does_not_claim_the_run_directory(train_config, tmp_path):
    nowhere = DataConfig(source="table", path=str(tmp_path / "nowhere.parquet"))
    with pytest.raises(ValueError, match="does not exist"):
        go(replace(train_config, data=nowhere))
    assert go(train_config).is_dir()


def test_the_same_command_resumes_and_another_config_is_refused(train_config, capsys):
    folder = go(train_config)
    before = load_file(folder / LORA)
    written = (folder / "anchor.json").stat().st_mtime_ns

    other_tracking = TrackingConfig(kind="none", project="other")
    assert go(replace(train_config, tracking=other_tracking)) == folder
    assert f"is finished: see {folder}" in capsys.readouterr().out
    assert (folder / "anchor.json").stat().st_mtime_ns == written
    assert_equal(before, load_file(folder / LORA))

    message = r"holds a run of another config: steps \(3 there, 5 here\)"
    with pytest.raises(ValueError, match=message):
        go(replace(train_config, steps=5))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_half_precision_starts_at_the_reference_too(train_config, method):
    tuned = replace(train_config.finetune, method=method)
    folder = go(replace(train_config, precision="bf16", finetune=tuned))
    rows = metrics(folder.parent)
    assert len(rows) == 3
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[0]["implicit_accuracy"] == 0.5


def test_an_anchor_of_a_mixed_reward_says_so_in_its_name_and_card(train_config):
    assert read_card(str(go(train_config))).reward == {"vivid": 1.0}
    mixed = replace(train_config.data, scorer={"vivid": 1, "crisp": 0.25})
    folder = go(replace(train_config, data=mixed))
    assert folder.parent.name == "x-dpo-lora-beta500-crisp0.25-vivid1-seed0"
    card = read_card(str(folder))
    assert card.reward == {"crisp": 0.25, "vivid": 1.0}
    assert card.dataset == "shapes_pairs, 12, 0.25 crisp + 1 vivid"

    # The order of the weights does not matter, and the same command resumes.
    same = replace(train_config.data, scorer={"crisp": 0.25, "vivid": 1.0})
    assert go(replace(train_config, data=same)) == folder


def test_training_does_not_depend_on_the_cache(train_config):
    uncached = replace(train_config.data, cache=False)
    with_cache = load_file(go(train_config) / LORA)
    without = load_file(go(replace(train_config, name="plain", data=uncached)) / LORA)
    assert with_cache.keys() == without.keys()
    for key in with_cache:
        torch.testing.assert_close(with_cache[key], without[key], rtol=1e-3, atol=1e-5)


def test_from_captioned_images_to_an_anchor(train_config, tmp_path):
    """The whole way of docs/own-images.md: CLIP, autoencoder, base model, scored pairs, anchor."""
    shapes.write_images(tmp_path / "pictures.parquet", 24, seed=0)
    images = DataConfig(source="table", path=str(tmp_path / "pictures.parquet"))
    new = ModelConfig(name="tiny", base=None, resolution=32, channels=[16, 32], clip_width=32)
    small = replace(train_config, objective="contrastive", model=new, data=images, steps=2)

    # The parts, and the base model of them.
    clip = go(small)
    averaged = replace(train_config.optim, ema=0.9)
    vae = go(replace(small, objective="autoencoder", optim=averaged))
    full = replace(train_config.finetune, method="full")
    parts = replace(new, clip=str(clip), vae=str(vae))
    base = go(replace(small, objective="pretrain", finetune=full, model=parts))

    # Pairs that the CLIP has labelled, an anchor and a scorer from them.
    scored = DataConfig(
        source="scored_pairs", path=images.path, count=8, scorer="clip", scorer_checkpoint=str(clip)
    )
    model = ModelConfig(name="mine", base=str(base), resolution=32)
    anchor = go(replace(train_config, model=model, data=scored))
    start = replace(new, clip=str(clip))
    scorer = go(replace(small, objective="preference", model=start, data=scored))
    assert (anchor / "anchor.json").is_file()
    assert (scorer / "model.safetensors").is_file()

    # The base model is a stock pipeline.
    pipe = StableDiffusionPipeline.from_pretrained(base)
    image = pipe(shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)


MISTAKES = [  # what is typed, and a part of the one sentence that answers; {base}: a base model
    ("dpo.bta=1", "dpo.bta"),
    ("dpo.beta=strong", "dpo.beta"),
    ("dpo.beta=0", "dpo.beta must be above 0, not 0.0"),
    ("dpo.lr=1", "there is no setting dpo.lr; did you mean optim.lr=1?"),
    (
        "objective=pretrain",
        "objective=pretrain learns from captioned images, "
        "which data.source=shapes_pairs does not give",
    ),
    ("objective=pretrain data=shapes_images", "add finetune=full"),
    ("model=tiny", "objective=dpo needs a base model"),
    ("model.base=runs/nowhere", "model.base=runs/nowhere is not there"),
    ("model.vae=nowhere model.base={base}", "model.vae=nowhere is not there: give an autoencoder"),
    ("model.resolution=30", "model.resolution must be a multiple of 8, not 30"),
    ("data.scorer=colourful", "labelled by vivid or crisp, not 'colourful'"),
    ("data.scorer={vivid:1,dull:1}", "labelled by vivid or crisp, not 'dull'"),
    ("data=scored_pairs data.path=nowhere data.scorer=judge", "give a scorer that runs here"),
    ("data.scorer={vivid:1,crisp:0}", "data.scorer.crisp must be above 0, not 0"),
    ("data.scorer={vivid:inf,crisp:1}", "data.scorer.vivid must be a finite number, not inf"),
    ("data.scorer={vivid:much,crisp:1}", "data.scorer.vivid must be a number above 0, not 'much'"),
    ("data.scorer={}", "data.scorer must be a scorer's name or the weights of several, as in"),
    ("data.scorer=[vivid,crisp]", "as in data.scorer={vivid:0.5,crisp:0.5}, not ['vivid'"),
    (
        "data=scored_pairs data.path={base} data.scorer={vivid:1,dull:1} model.base={base}",
        "there is no scorer 'dull'",
    ),
    (
        "data=scored_pairs data.path=nowhere data.scorer={clip:1} data.scorer_checkpoint=here",
        "data.scorer is a sum of several: remove data.scorer_checkpoint",
    ),
    (
        "data=table data.path=nowhere.parquet model.base={base}",
        "data.path=nowhere.parquet is not there",
    ),
    (
        "runs=/dev/null/runs model.base={base}",
        "cannot be written, because of /dev/null: give runs=",
    ),
    ("finetune.method=dora", "finetune.method must be one of lora, full, not 'dora'"),
    (
        "finetune.targets=[to_q,to_z] model.base={base}",
        "finetune.targets: to_z matches no layer of {base}; those of",
    ),
    ("finetune.targets=to_q", "finetune.targets is a list: give 'finetune.targets=[to_q]'"),
    (
        "optim.name=adamw8bit_torchao",
        "adamw8bit_torchao needs a package that is not installed: type pip install torchao",
    ),
    ("hub.push_to=me", "hub.push_to=me names no hub repository: give user/name"),
    (
        "hub.push_to=me/it",
        "hub.push_to=me/it needs an account: type hf auth login, or set HF_TOKEN",
    ),
    ("optim.accumulation=4", "give optim.pairs_per_step, from which accumulation follows"),
    (
        "optim.batch_size=32",
        "optim.batch_size=32 does not divide pairs_per_step=16: give batch_size=16, or",
    ),
    ("tracking.mode=off", "tracking.mode must be online or offline"),
    ("steps=0", "steps must be above 0"),
]


@pytest.mark.parametrize("typed, answer", MISTAKES)
def test_mistakes_are_refused_in_one_sentence(
    typed, answer, base_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        "deradiff.models.base_model.BaseModel.load_pipeline",
        lambda *_, **__: pytest.fail("a weight was loaded"),
    )
    overrides = typed.replace("{base}", str(base_folder)).split()
    with pytest.raises(SystemExit) as stop:
        type_here(
            ["train", "tracking=none", f"runs={tmp_path}", "cpu=true", *overrides], monkeypatch
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("train: ")
    assert answer.replace("{base}", str(base_folder)) in err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.glob("train/*"))


def test_the_help_lists_every_key_with_its_meaning_and_the_groups_with_their_choices(
    monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    main()
    out = capsys.readouterr().out
    assert "which weights are trained: full | lora (default: lora)\n" in out
    assert "where numbers and images go: none | tensorboard | wandb" in out
    assert "\n  scorers" not in out
    keys = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert {
        "optim.lr",
        "finetune.targets",
        "panel.every",
        "hub.push_to",
        "keep_best",
        "data.path",
    } <= keys
    assert "(default: 2000.0)" in out
    assert "KL strength" in out


def settings_without_help(schema, prefix=""):
    """The dotted keys of a config that say nothing of themselves."""
    found = []
    types = get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(types[field.name]):
            found += settings_without_help(types[field.name], f"{prefix}{field.name}.")
        elif not field.metadata.get("help"):
            found.append(f"{prefix}{field.name}")
    return found


def test_a_panels_lambdas_are_numbers():
    with pytest.raises(ValueError, match=r"panel.lambdas must be finite numbers, not nan"):
        PanelConfig(lambdas=[0.0, float("nan")])


def test_every_setting_has_a_help_text():
    missing = settings_without_help(TrainConfig)
    assert not [key for key in missing if not key.startswith("tracking.")]


def command(overrides, base_folder, tmp_path, *prefix):
    """The command of a small run, for a process of its own."""
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
    return [sys.executable, "-m", *prefix, "train", *typed, *overrides]


def type_here(command, monkeypatch):
    """Run the command of another process in this one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr("sys.argv", command[command.index("train") :])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it, and here it must be unset again
    try:
        main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def lora_of(tmp_path, name):
    """The weights of a run's anchor."""
    return load_file(tmp_path / "train" / name / "anchor" / LORA)


def test_a_run_that_is_killed_in_the_middle_ends_as_if_it_had_not_been(
    base_folder, tmp_path, monkeypatch
):
    typed = ["steps=6", "checkpoint_every=2", "log_every=2"]
    typed += ["optim.pairs_per_step=4", "optim.batch_size=2"]
    type_here(command([*typed, "name=whole"], base_folder, tmp_path), monkeypatch)

    # Killed in its fourth step, which begins when six batches are done.
    killed = command([*typed, "name=killed"], base_folder, tmp_path)

    def die() -> None:
        batches = []

        def loss(self, network, batch):
            batches.append(batch)
            if len(batches) == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return usual_loss(self, network, batch)

        usual_loss = DPO.loss
        monkeypatch.setattr(DPO, "loss", loss)
        type_here(killed, monkeypatch)

    _, status = os.waitpid(start(die), 0)
    assert os.WIFSIGNALED(status)
    run_dir = tmp_path / "train/killed"
    assert [path.name for path in run_dir.glob("checkpoints/step-*")] == ["step-000002"]

    # The same command goes on.
    type_here(killed, monkeypatch)
    assert_equal(lora_of(tmp_path, "whole"), lora_of(tmp_path, "killed"))
    assert [row["step"] for row in metrics(run_dir)] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("data", [[], ["data.streaming=true", "data.cache=false"]])
def test_two_ranks_of_the_command_end_as_one_and_one_goes_on(data, base_folder, tmp_path):
    typed = ["steps=6", "log_every=1", "checkpoint_every=3", "optim.batch_size=2", *data]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    of_two_ranks = command([*typed, "name=two"], base_folder, tmp_path, *torchrun)
    if not torch.accelerator.is_available():
        # Two ranks are one run also where nobody says that there is no GPU.
        of_two_ranks.remove("cpu=true")
    one = command([*typed, "name=one"], base_folder, tmp_path)
    for typed_command in (of_two_ranks, one):
        subprocess.run(typed_command, check=True, capture_output=True, timeout=300)
    of_two = lora_of(tmp_path, "two")
    of_one = lora_of(tmp_path, "one")
    for key in of_one:
        assert close(of_two[key], of_one[key]), key

    # One rank goes on from the third step of the two, with another batch size.
    run_dir = tmp_path / "train/two"
    shutil.rmtree(run_dir / "checkpoints/step-000006")
    (run_dir / "finished.json").unlink()
    rest = command([*typed, "name=two", "optim.batch_size=4"], base_folder, tmp_path)
    subprocess.run(rest, check=True, capture_output=True, timeout=300)
    resumed = lora_of(tmp_path, "two")
    for key in of_one:
        assert close(resumed[key], of_one[key]), key


def close(weight, expected):
    """Equal but for the order of sums, which AdamW enlarges where a gradient is nearly 0."""
    return (weight - expected).norm() < 5e-3 * expected.norm()
