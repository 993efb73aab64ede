"""What a finished run leaves: anchors that stock diffusers loads, a picture, a README, an upload, tracked numbers."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

import deradiff
from configs.tracking import Guarded, Tracker, TrackingConfig
from deradiff import hub
from deradiff.anchors.anchor import AnchorCard
from deradiff.anchors.model_card import write_model_card
from tests.support.train_runs import go
from train.config import FinetuneConfig, HubConfig, PanelConfig


def latents(pipe, **more):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipe(
        "a red circle",
        num_inference_steps=3,
        height=64,
        width=64,
        generator=noise,
        output_type="latent",
        **more,
    ).images


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stock_diffusers_samples_what_we_sample(train_config, base_folder, method):
    folder = go(replace(train_config, finetune=replace(train_config.finetune, method=method)))
    stock, ours = (
        StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None) for _ in range(2)
    )
    before = latents(stock)
    if method == "lora":
        stock.load_lora_weights(folder)
    else:
        stock.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with deradiff.realign(ours, folder, lam=1.0):
        realigned = latents(ours)
    assert torch.equal(latents(stock), realigned) and not torch.equal(before, realigned)


def test_an_anchor_is_a_whole_repository_with_a_picture_and_a_readme(train_config):
    panel = PanelConfig(
        every=2, prompts=["a red circle", "a blue square"], lambdas=[0.0, 1.0, 2.0], steps=2
    )
    folder = go(replace(train_config, panel=panel))
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "anchor.json",
        "grid.png",
        "pytorch_lora_weights.safetensors",
    ]
    assert sorted(p.name for p in (folder.parent / "panel").iterdir()) == [
        "step-000002.png",
        "step-000003.png",
    ]
    sheet = Image.open(folder / "grid.png")
    side = sheet.width // 3
    cells = [
        [
            sheet.crop((x * side, 14 + y * (side + 14) + 14, (x + 1) * side, (y + 1) * (side + 14)))
            for x in range(3)
        ]
        for y in range(2)
    ]
    assert len({c.tobytes() for row in cells for c in row}) == 6, "prompts and lambdas all differ"
    text = (folder / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    assert "base_model" not in front and "- lora" in front, (
        "the hub refuses a base that is a folder of somebody's machine"
    )
    for said in (
        "beta = 500",
        "`mean-half`",
        "rank 4, alpha 8",
        "learning rate | 0.004 (inverse_beta)",
        "GPU-hours",
        "](grid.png)",
        "with deradiff.realign(pipe,",
        "StableDiffusionPipeline.from_pretrained",
    ):
        assert said in body, said
    plain = go(replace(train_config, name="plain"))
    weights = "pytorch_lora_weights.safetensors"
    from safetensors.torch import load_file

    a, b = load_file(folder / weights), load_file(plain / weights)
    assert all(torch.equal(a[key], b[key]) for key in a), "pictures do not disturb training"


def test_an_anchor_is_pushed_when_it_is_finished_and_again_by_the_same_command(
    train_config, monkeypatch, capsys
):
    calls = []

    class Api:
        def create_repo(self, repo, exist_ok):
            assert exist_ok
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
            if len(calls) == 1:
                raise OSError("the hub is down")

    monkeypatch.setattr("deradiff.hub.HfApi", Api)
    monkeypatch.setattr("deradiff.hub.get_token", lambda: "token")
    wanted = replace(train_config, hub=HubConfig("me/anchor-500"))
    with pytest.raises(
        ValueError,
        match="is whole but was not uploaded to me/anchor-500: the hub is down; the same command tries again",
    ):
        go(wanted)
    folder = go(wanted)
    assert (
        calls
        == [("me/anchor-500", ["README.md", "anchor.json", "pytorch_lora_weights.safetensors"])] * 2
    )
    assert "uploaded to https://hub/me/anchor-500" in capsys.readouterr().out
    assert 'load_lora_weights("me/anchor-500")' in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="names no hub repository"):
        hub.check_push("me")


@pytest.mark.parametrize(
    "base_model, method",
    [("org/name", "lora"), ("org/name", "full"), ("asset:shapes/base", "lora")],
)
def test_the_readme_names_its_base_where_the_hub_can_link_it(tmp_path, base_model, method):
    card = AnchorCard(base_model=base_model, family="sd15", method=method, beta=500.0)
    write_model_card(tmp_path, card, {})
    front, body = (tmp_path / "README.md").read_text().split("---\n")[1:3]
    relation = {"lora": "adapter", "full": "finetune"}[method]
    assert (f"base_model: org/name\nbase_model_relation: {relation}\n" in front) == (
        base_model == "org/name"
    )
    assert yaml.safe_load(front)["library_name"] == "diffusers"
    loaded = (
        'from_pretrained(locate("asset:shapes/base"))'
        if base_model.startswith("asset")
        else f'from_pretrained("{base_model}")'
    )
    assert f"pipe = StableDiffusionPipeline.{loaded}\n" in body and ("import locate" in body) == (
        "locate(" in body
    )


def test_a_full_anchor_says_how_stock_diffusers_takes_it(train_config):
    folder = go(replace(train_config, finetune=FinetuneConfig(method="full"), steps=1))
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder", subfolder="unet")' in text


def test_a_tracker_that_fails_is_told_once_and_does_not_stop_the_run(capsys):
    class Down(Tracker):
        def log(self, values, step=None):
            raise ConnectionError("no route")

    guarded = Guarded(Down(), "train")
    guarded.log({"loss": 1.0}, 1)
    guarded.log({"loss": 1.0}, 2)
    guarded.artifact("a", "model", None)
    assert (
        capsys.readouterr().err
        == "train: the tracker failed (log: no route); going on without it\n"
    )


def test_a_tracker_that_does_not_start_does_not_stop_the_run(train_config, monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("no such project")

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(login=lambda **_: False, init=refuse, Settings=lambda **_: None),
    )
    assert go(replace(train_config, steps=1, tracking=TrackingConfig(kind="wandb"))).is_dir()
    assert (
        "the tracker wandb did not start (no such project); going on without it"
        in capsys.readouterr().err
    )


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(train_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = go(
        replace(
            train_config,
            tracking=TrackingConfig(kind="tensorboard"),
            panel=PanelConfig(every=2, steps=1, lambdas=[0.0, 1.0]),
        )
    )
    events = EventAccumulator(str(folder.parent / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [
        (r["step"], r["loss"]) for r in rows
    ]
    assert [e.step for e in events.Images("panel")] == [2, 3]
