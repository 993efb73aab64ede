"""What a finished run leaves: an anchor for stock diffusers, panels, a README, an upload."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import deradiff
from configs.tracking import GuardedTracker, Tracker, TrackingConfig, tracker
from deradiff import hub
from deradiff.anchors.anchor import AnchorCard, load_anchor
from deradiff.anchors.model_card import write_model_card
from deradiff.image_files import is_whole_png
from tests.support.train_runs import go
from train import results
from train.config import DPOConfig, FinetuneConfig, HubConfig, PanelConfig

LORA = "pytorch_lora_weights.safetensors"
LINE = 14  # pixels of a line of text in a panel


def latents(pipe):
    """The latents of one image, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red circle",
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stock_diffusers_samples_what_we_sample(train_config, base_folder, method):
    tuned = replace(train_config.finetune, method=method)
    folder = go(replace(train_config, finetune=tuned))
    stock = StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None)
    ours = StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None)
    before = latents(stock)
    if method == "lora":
        stock.load_lora_weights(folder)
    else:
        stock.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with deradiff.realign(ours, folder, lam=1.0):
        realigned = latents(ours)
    assert torch.equal(latents(stock), realigned)
    assert not torch.equal(before, realigned)


def cells_of(sheet, rows, columns):
    """The images of a panel, without their lines of text."""
    side = sheet.width // columns
    cells = []
    for row in range(rows):
        top = LINE + row * (side + LINE) + LINE
        for column in range(columns):
            left = column * side
            cells.append(sheet.crop((left, top, left + side, top + side)))
    return cells


def test_an_anchor_is_a_whole_repository_with_a_panel_and_a_readme(train_config):
    panel = PanelConfig(
        every=2, prompts=["a red circle", "a blue square"], lambdas=[0.0, 1.0, 2.0], steps=2
    )
    folder = go(replace(train_config, panel=panel))
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "anchor.json",
        "grid.png",
        LORA,
    ]
    panels = sorted(file.name for file in (folder.parent / "panel").iterdir())
    assert panels == ["step-000002.png", "step-000003.png"]

    # Prompts and lambdas all differ.
    cells = cells_of(Image.open(folder / "grid.png"), rows=2, columns=3)
    assert len({cell.tobytes() for cell in cells}) == 6

    # The README. The hub refuses a base that is a folder of somebody's machine.
    front, body = (folder / "README.md").read_text().split("---\n")[1:3]
    assert "base_model" not in front
    assert "- lora" in front
    for words in (
        "beta = 500",
        "`mean-half`",
        "rank 4, alpha 8",
        "learning rate | 0.004 (inverse_beta)",
        "GPU-hours",
        "](grid.png)",
        "with deradiff.realign(pipe,",
        "StableDiffusionPipeline.from_pretrained",
    ):
        assert words in body

    # Panels do not disturb training.
    plain = load_file(go(replace(train_config, name="plain")) / LORA)
    with_panels = load_file(folder / LORA)
    assert all(torch.equal(with_panels[key], plain[key]) for key in with_panels)


def test_an_anchor_is_pushed_when_it_is_finished_and_again_by_the_same_command(
    train_config, monkeypatch, capsys
):
    uploads = []

    class Api:
        """The hub, which is down at first."""

        def create_repo(self, repo, exist_ok):
            assert exist_ok
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploads.append((repo_id, sorted(file.name for file in folder_path.iterdir())))
            if len(uploads) == 1:
                raise OSError("the hub is down")

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "get_token", lambda: "token")
    config = replace(train_config, hub=HubConfig("me/anchor-500"))
    message = (
        "is whole but was not uploaded to me/anchor-500: the hub is down; "
        "the same command tries again"
    )
    with pytest.raises(ValueError, match=message):
        go(config)

    folder = go(config)
    assert uploads == [("me/anchor-500", ["README.md", "anchor.json", LORA])] * 2
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
    assert yaml.safe_load(front)["library_name"] == "diffusers"

    relation = {"lora": "adapter", "full": "finetune"}[method]
    link = f"base_model: org/name\nbase_model_relation: {relation}\n"
    assert (link in front) == (base_model == "org/name")
    if base_model.startswith("asset:"):
        loaded = f'from_pretrained(locate("{base_model}"))'
    else:
        loaded = f'from_pretrained("{base_model}")'
    assert f"pipe = StableDiffusionPipeline.{loaded}\n" in body
    assert ("import locate" in body) == ("locate(" in body)


@pytest.mark.parametrize(
    "objective, convention, words, tag, explained",
    [
        ("dpo", "mean-half", "aligned once by Diffusion-DPO at", "diffusion-dpo", True),
        ("kto", "sum", "aligned once by the objective `kto` at", "kto", False),
    ],
)
def test_the_readme_names_the_objective_and_what_its_beta_multiplies(
    tmp_path, objective, convention, words, tag, explained
):
    card = AnchorCard(
        base_model="org/name",
        family="sd15",
        method="lora",
        beta=500.0,
        objective=objective,
        beta_convention=convention,
    )
    write_model_card(tmp_path, card, {})
    front, body = (tmp_path / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(front)["tags"] == ["deradiff", tag, "sd15", "lora"]
    assert words in body
    assert f"500, in the convention `{convention}`" in body
    assert ("half the difference" in body) == explained


def test_a_full_anchor_says_how_stock_diffusers_takes_it(train_config):
    folder = go(replace(train_config, finetune=FinetuneConfig(method="full"), steps=1))
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder", subfolder="unet")' in text


def test_a_tracker_that_fails_is_told_once_and_does_not_stop_the_run(capsys):
    class Down(Tracker):
        def log(self, values, step=None):
            raise ConnectionError("no route")

    guarded = GuardedTracker(Down(), "train")
    guarded.log({"loss": 1.0}, 1)
    guarded.log({"loss": 1.0}, 2)
    guarded.artifact("a", "model", None)
    err = capsys.readouterr().err
    assert err == "train: the tracker failed (log: no route); going on without it\n"


def test_a_tracker_that_does_not_start_does_not_stop_the_run(train_config, monkeypatch, capsys):
    def refuse(**_):
        raise RuntimeError("no such project")

    wandb = SimpleNamespace(login=lambda **_: False, init=refuse, Settings=lambda **_: None)
    monkeypatch.setattr("configs.wandb_tracker.wandb", wandb)
    assert go(replace(train_config, steps=1, tracking=TrackingConfig(kind="wandb"))).is_dir()
    message = "the tracker wandb did not start (no such project); going on without it"
    assert message in capsys.readouterr().err


def test_a_tracker_that_fails_or_hangs_at_its_end_does_not_end_or_hold_a_run(
    train_config, monkeypatch, capsys
):
    class Run:
        id = "x"
        dir = "offline-run-x/files"
        url = None
        offline = True
        hangs = False

        def __init__(self, **_):
            self.codes = []

        def log(self, *_, **__):
            pass

        log_artifact = log

        def finish(self, exit_code):
            if self.hangs:
                time.sleep(60)
            raise RuntimeError("the network is gone")

    wandb = SimpleNamespace(
        login=lambda **_: False,
        init=Run,
        Settings=lambda **_: None,
        Artifact=lambda *_, **__: SimpleNamespace(add_dir=lambda _: None),
    )
    monkeypatch.setattr("configs.wandb_tracker.wandb", wandb)
    monkeypatch.setattr("configs.wandb_tracker.FINISH_SECONDS", 0.1)
    monkeypatch.setattr("configs.wandb_tracker.ABANDONED", [])
    tracked = replace(train_config, steps=1, tracking=TrackingConfig(kind="wandb"))
    assert go(tracked).is_dir()
    assert "train: the tracker failed at its end (the network is gone)" in capsys.readouterr().err

    monkeypatch.setattr(Run, "hangs", True)
    with pytest.raises(ValueError, match="no good"), tracker_of(tracked):
        raise ValueError("no good")
    err = capsys.readouterr().err
    sync = "wandb sync offline-run-x uploads"
    assert err.startswith(f"train: W&B has not finished within 0.1 seconds; {sync}")
    assert "Traceback" not in err


def tracker_of(config):
    return tracker(config.tracking, "train", Path(config.runs), {})


def test_a_panel_that_a_kill_or_a_bit_has_spoilt_is_drawn_again(train_config, monkeypatch):
    panel = PanelConfig(every=2, prompts=["a red circle"], lambdas=[0.0, 1.0], steps=1)
    config = replace(train_config, panel=panel)
    folder = go(config)
    last = folder.parent / "panel/step-000003.png"
    whole = last.read_bytes()
    assert is_whole_png(last)

    (folder.parent / "finished.json").unlink()
    for spoilt in (whole[:-20], whole[:100] + b"?" + whole[101:], b"", whole + b"0"):
        last.write_bytes(spoilt)
        assert not is_whole_png(last)
    go(config)
    assert last.read_bytes() == whole
    assert (folder / "grid.png").read_bytes() == whole
    left = sorted(file.name for file in last.parent.iterdir())
    assert left == ["step-000002.png", "step-000003.png"]


def test_a_finished_anchor_that_is_not_what_was_written_is_made_again(train_config, capsys):
    folder = go(train_config)
    for name, place in ((LORA, -30), ("anchor.json", 30)):
        file = folder / name
        whole = file.read_bytes()
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        file.write_bytes(spoilt)
        go(train_config)
        assert "it is made again" in capsys.readouterr().err
        if name == LORA:
            assert file.read_bytes() == whole
        assert load_anchor(folder).check_weights() is None

    # A mark that cannot be read, or names another folder, marks nothing.
    for mark in ("{torn", '{"folder": "../secrets"}', '{"folder": "checkpoints"}', "[]"):
        (folder.parent / "finished.json").write_text(mark)
        assert results.finished_folder(train_config, folder.parent) is None


def test_the_card_says_the_same_cost_wherever_a_run_was_interrupted(train_config, monkeypatch):
    config = replace(train_config, steps=4)
    whole = json.loads((go(replace(config, name="whole")) / "anchor.json").read_text())

    # Interrupted after its last step, when the store holds all of the reference's errors.
    other = replace(config, name="stopped", runs=f"{config.runs}/other")
    monkeypatch.setattr(results, "add_cost", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(other)
    monkeypatch.undo()
    stopped = json.loads((go(other) / "anchor.json").read_text())
    assert stopped["flops"] == whole["flops"]

    # A run with another beta is spared the reference.
    folder = go(replace(other, name="spared", dpo=DPOConfig(9.0)))
    spared = json.loads((folder / "anchor.json").read_text())
    assert spared["flops"] < whole["flops"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(train_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = TrackingConfig(kind="tensorboard")
    panel = PanelConfig(every=2, steps=1, lambdas=[0.0, 1.0])
    run_dir = go(replace(train_config, tracking=tracking, panel=panel)).parent
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [row["step"] for row in rows]
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in rows])
    assert [event.step for event in events.Images("panel")] == [2, 3]
