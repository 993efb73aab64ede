"""The sample stage on tiny pipelines: its images, its manifest, resuming, and what it tracks."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image
from safetensors.torch import load_file

from configs.tracking import Tracker, TrackingConfig
from deradiff.anchors.anchor import LORA_FILE, AnchorCard, load_anchor, save_anchor, write_card
from deradiff.data.prompts import Prompt
from deradiff.digests import anchor_digest
from deradiff.evaluation.manifest import ImageRecord, read_cards, read_samples
from deradiff.files import slug
from deradiff.method.schedulers import make_scheduler
from sample.batches import batches_to_sample, plan
from sample.config import SampleConfig
from sample.manifest import image_path, intact, merge, save_image
from sample.resolve import resolve
from sample.sampling import PromptSeed, load_sampler, timesteps_digest
from sample.stage import run
from tests.support.sample_stage import (
    BETA,
    difference,
    prompt_seed,
    read_images,
    read_manifest,
    save_anchors,
)
from tests.support.tiny_pipelines import tiny_lora, tiny_pipeline

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox", "🦊/../fox", "a red fox"]
NO_DIGEST = {"weights_digest": None}
FOX = prompt_seed("a red fox", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base model, a full anchor and a LoRA of SD1.5 and SDXL: see `save_anchors`."""
    return save_anchors(tmp_path_factory.mktemp("tiny"), ("sd15", "sdxl"), scale=0.5)


@pytest.fixture
def config(tiny):
    """Three lambdas of three prompts, of which two are the same."""
    return SampleConfig(
        anchor=str(tiny / "sd15-lora/anchor"),
        lambdas=[0.0, 0.5, 1.0],
        prompts=PROMPTS,
        steps=3,
        guidance_scale=3.0,
        tracking=TrackingConfig("none"),
    )


# Images


def load_anchor_into(pipe, anchor):
    """As a user of diffusers would."""
    if anchor.method == "lora":
        pipe.load_lora_weights(anchor.root)
    else:
        pipe.unet = type(pipe.unet).from_pretrained(anchor.root, subfolder="unet")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral"])
@pytest.mark.parametrize("anchor", ["sd15-full", "sdxl-lora"])
def test_reference_and_anchor_are_the_stock_pipelines(tiny, config, tmp_path, anchor, sampler):
    path = str(tiny / anchor / "anchor")
    config = replace(config, anchor=path, sampler=sampler, prompts=PROMPTS[:1])
    run(config, tmp_path / "run")
    images = read_images(tmp_path / "run")
    config, base, (anchor,) = resolve(config)

    stock_images = []
    for lam in (0.0, 1.0):
        pipe = load_sampler(config, base, torch.device("cpu"))
        if lam == 1:
            load_anchor_into(pipe, anchor)
        noise = torch.Generator().manual_seed(FOX.generator_seed)
        output = pipe("a red fox", num_inference_steps=3, guidance_scale=3.0, generator=[noise])
        stock = np.asarray(output.images[0]).astype(int)
        stock_images.append(stock)
        assert np.array_equal(images[FOX.image((lam,))], stock), f"lam {lam}"

    reference, aligned = stock_images
    assert abs(reference - aligned).mean() > 1
    half = images[FOX.image((0.5,))]
    assert abs(half - reference).mean() > 1
    assert abs(half - aligned).mean() > 1


def test_an_image_depends_on_prompt_seed_and_lambda_alone(config, tmp_path):
    config = replace(config, seeds=[0, 1])
    run(replace(config, batch_size=6), tmp_path / "together")
    in_another_order = replace(
        config, batch_size=1, prompts=PROMPTS[::-1], lambdas=[1.0, 0.0, 0.5], seeds=[1, 0]
    )
    run(in_another_order, tmp_path / "alone")
    together = read_images(tmp_path / "together")
    assert difference(together, read_images(tmp_path / "alone")) <= 1

    # Other prompts and seeds get other noise
    references = [image for name, image in together.items() if name.startswith("lam=0.00")]
    for position, one in enumerate(references):
        for other in references[:position]:
            assert abs(one - other).mean() > 1


@pytest.mark.slow
def test_two_ranks_make_the_same_images_as_one_process(config, tmp_path):
    run(config, tmp_path / "one")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [
        *launch,
        *("--nproc_per_node", "2"),
        *("-m", "sample"),
        f"anchor={config.anchor}",
        "lambdas=[0,0.5,1]",
        "prompts=['a red fox','🦊/../fox','a red fox']",
        "steps=3",
        "guidance_scale=3",
        "tracking=none",
        f"runs={tmp_path}/runs",
        "name=two",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 prompts x 1 seeds x 3 lambdas") == 1, "one rank speaks"
    # Two prompts are the first rank's and one is the second's
    assert "6 images a process" in done.stdout

    two = tmp_path / "runs/sample/two"
    assert difference(read_images(tmp_path / "one"), read_images(two)) <= 1
    order = [record["image"] for record in read_manifest(tmp_path / "one")]
    assert order == [record["image"] for record in read_manifest(two)]


# The manifest


def test_the_manifest_keeps_its_contract(config, tmp_path):
    run(replace(config, seeds=[0, 7]), tmp_path)
    records = read_manifest(tmp_path)
    assert len(records) == 3 * 2 * 3
    assert len({record["image"] for record in records}) == len(records)
    assert len({record["prompt_id"] for record in records}) == 3
    assert {record["prompt"] for record in records} == set(PROMPTS)
    assert intact(tmp_path) == {record["image"] for record in records}
    assert not list(tmp_path.glob("*.part"))

    same_for_all = {
        "anchor": config.anchor,
        "beta": BETA,
        "mode": "exact",
        "sampler": "euler_ancestral",
        "steps": 3,
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
    }
    targets = {0.0: None, 0.5: 2 * BETA, 1.0: BETA}
    for record in records:
        assert record.items() >= same_for_all.items()
        assert record["beta_target"] == targets[record["lam"]]
        one = PromptSeed(Prompt(record["prompt_id"], record["prompt"]), record["seed"])
        assert record["generator_seed"] == one.generator_seed
        lam = f"{record['lam']:.2f}"
        assert record["image"] == f"lam={lam}/{record['prompt_id']}-s{record['seed']}.png"
        assert Image.open(tmp_path / record["image"]).size == (64, 64)
        # One schema for writer and reader
        assert set(ImageRecord.__annotations__) <= set(record)


def test_an_image_of_nan_is_refused_and_not_saved_as_black(config, tmp_path):
    overflowing = replace(config, guidance_scale=1e300, prompts=["a fox"], lambdas=[0.5])
    with pytest.raises(FloatingPointError, match="not finite, and would be black: give dtype="):
        run(overflowing, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_the_path_kl_grows_with_lambda(config, tmp_path):
    run(replace(config, seeds=[0, 7]), tmp_path)
    kl_of = {0.0: [], 0.5: [], 1.0: []}
    for record in read_manifest(tmp_path):
        kl_of[record["lam"]].append(record["path_kl"])
    assert set(kl_of[0.0]) == {0}
    for half, anchor in zip(sorted(kl_of[0.5]), sorted(kl_of[1.0])):
        assert 0 < half < anchor


def test_path_kl_is_null_where_it_was_not_paid_for(config, tmp_path):
    run(replace(config, path_kl=False), tmp_path)
    for record in read_manifest(tmp_path):
        assert (record["path_kl"] is None) == (record["lam"] == 1)


def test_mode_weights_measures_path_kl_where_it_is_asked_for(config, tmp_path):
    run(replace(config, path_kl=True, mode="weights"), tmp_path)
    for record in read_manifest(tmp_path):
        assert record["mode"] == "weights"
        if record["lam"]:
            assert record["path_kl"] > 0


def test_the_grid_has_a_column_for_each_lambda(config, tmp_path):
    run(config, tmp_path)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 3 * 192
    assert grid.height > 3 * 192


def test_distinct_lambdas_never_share_a_folder():
    lambdas = [0.0, 0.5, 1.0, 0.125, 0.12, 0.1, 0.1 + 1e-12, 1e-5, 10.0, 1 / 3]
    assert len({image_path((lam,), "a", 0) for lam in lambdas}) == len(lambdas)
    assert image_path((0.5,), "a", 3) == "lam=0.50/a-s3.png"
    assert image_path((0.125,), "a", 0) == "lam=0.125/a-s0.png"


def test_a_line_that_a_kill_cut_short_is_not_read(tmp_path):
    record = {
        "image": "lam=0.00/a-s0.png",
        "prompt_id": "a",
        "prompt": "a fox",
        "seed": 0,
        "anchor": "a",
        "beta": None,
        "lam": 0.0,
        "beta_target": None,
        "mode": "exact",
        "sampler": "ddim",
        "steps": 1,
        "guidance_scale": 1.0,
        "height": 8,
        "width": 8,
        "path_kl": None,
    }
    save_image(tmp_path, 3, b"one", record)
    with open(tmp_path / "manifest.3.part", "a") as part:
        part.write('{"image": "lam=0.50/a-s0')
    save_image(tmp_path, 0, b"gone", record | {"image": "lam=1.00/a-s0.png", "lam": 1.0})
    (tmp_path / "lam=1.00/a-s0.png").unlink()
    assert [one["image"] for one in merge(tmp_path)] == ["lam=0.00/a-s0.png"]
    assert intact(tmp_path) == {"lam=0.00/a-s0.png"}
    assert not list(tmp_path.glob("*.part"))


# Resuming


class Killed(BaseException):
    """Ends a run as a kill would: nothing catches it."""


def test_a_killed_run_loses_nothing_and_the_same_command_makes_the_rest(
    config, tmp_path, monkeypatch
):
    run(config, tmp_path / "complete")
    config = replace(config, batch_size=2)
    saved = []

    def save_and_note(*arguments):
        save_image(*arguments)
        saved.append(arguments[-1]["image"])

    def save_four(*arguments):
        if len(saved) == 4:
            raise Killed
        save_and_note(*arguments)

    # Killed after four images
    killed = tmp_path / "killed"
    monkeypatch.setattr("sample.sweep.save_image", save_four)
    with pytest.raises(Killed):
        run(config, killed)
    assert not read_manifest(killed)
    assert len(saved) == 4
    times = {name: (killed / name).stat().st_mtime_ns for name in saved}

    # The same command makes the others
    monkeypatch.setattr("sample.sweep.save_image", save_and_note)
    run(config, killed)
    assert len(saved) == 9
    assert len(set(saved)) == 9, "no image is made twice"
    assert {name: (killed / name).stat().st_mtime_ns for name in times} == times
    assert difference(read_images(tmp_path / "complete"), read_images(killed)) <= 1


def test_a_complete_run_loads_no_weights_again(config, tmp_path, monkeypatch):
    run(config, tmp_path)
    before = (tmp_path / "manifest.jsonl").read_bytes()

    def refuse(*arguments):
        pytest.fail("weights were loaded")

    monkeypatch.setattr("sample.sweep.load_sampler", refuse)
    run(config, tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def without_pace(records):
    return [one | {"seconds": None, "digest": None} for one in records]


def test_what_is_there_is_kept_and_what_is_damaged_or_new_is_made(config, tmp_path, capsys):
    run(config, tmp_path)
    records = read_manifest(tmp_path)
    whole = [(tmp_path / record["image"]).read_bytes() for record in records]
    damaged, removed, kept, torn, flipped = (tmp_path / record["image"] for record in records[:5])
    damaged.write_bytes(b"damaged")
    removed.unlink()
    time = kept.stat().st_mtime_ns

    # Two lines of the manifest are not as they were written.
    lines = (tmp_path / "manifest.jsonl").read_bytes().split(b"\n")
    lines[3] = lines[3][:50] + b"\xff"
    lines[4] = lines[4].replace(b'"seed": 0', b'"seed": 4')
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(lines))
    capsys.readouterr()

    run(replace(config, lambdas=[0.25, 1.0], seeds=[0, 1]), tmp_path)
    err = capsys.readouterr().err
    assert "manifest.jsonl line 4 is not JSON" in err
    assert "manifest.jsonl line 5 cannot be used (it is not what was written); its" in err
    run(config, tmp_path)
    assert kept.stat().st_mtime_ns == time
    after = read_manifest(tmp_path)
    assert len(after) == 9 + 3 + 6

    # What was made again was so in its batch, to the same bytes.
    again = [one for one in after if one["lam"] != 0.25 and one["seed"] == 0]
    assert without_pace(again) == without_pace(records)
    assert [(tmp_path / record["image"]).read_bytes() for record in again] == whole
    assert torn.is_file() and flipped.is_file()


def test_an_interrupted_run_ends_with_the_images_of_a_whole_one(config, tmp_path, monkeypatch):
    config = replace(config, batch_size=2, seeds=[0, 1])
    run(config, tmp_path / "whole")

    # Interrupted in the middle of a batch, several times.
    for images in (1, 4, 2, 7):
        made = []

        def save(*arguments, made=made, images=images):
            if len(made) == images:
                raise KeyboardInterrupt
            made.append(save_image(*arguments))

        monkeypatch.setattr("sample.sweep.save_image", save)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "stopped")
    monkeypatch.undo()
    run(config, tmp_path / "stopped")
    records, of_whole = (read_manifest(tmp_path / name) for name in ("stopped", "whole"))
    assert without_pace(records) == without_pace(of_whole)
    for name in [record["image"] for record in records] + ["grid.png", ".batches.json"]:
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_a_plan_of_batches_that_cannot_be_kept_is_made_anew(config, tmp_path, capsys):
    run(replace(config, prompts=PROMPTS[:2]), tmp_path)
    plan = tmp_path / ".batches.json"
    assert [len(batch) for batch in json.loads(plan.read_text())["batches"]] == [2]

    # Batches of an earlier command that are too large now, and a damaged file.
    run(replace(config, batch_size=1), tmp_path)
    assert [len(batch) for batch in json.loads(plan.read_text())["batches"]] == [1]
    plan.write_text("{torn")
    run(config, tmp_path)
    assert f"{plan} is written again" in capsys.readouterr().err
    assert json.loads(plan.read_text())["batches"] == []


def test_processes_have_a_batch_each(tmp_path):
    wanted = [prompt_seed(text, 0) for text in "abcdef"]
    plan(tmp_path, wanted, lambda one: True, limit=16, processes=4)
    batches = batches_to_sample(tmp_path, wanted, lambda one: True)
    assert [len(batch) for batch in batches] == [2, 2, 2]


def test_a_card_that_was_edited_after_sampling_is_noticed(tiny, config, tmp_path):
    folder = tmp_path / "anchor"
    shutil.copytree(tiny / "sd15-lora/anchor", folder)
    config = replace(config, anchor=str(folder), lambdas=[0.0, 1.0], prompts=["a red fox"])
    run(config, tmp_path / "run")
    read_cards(read_samples([str(tmp_path / "run")]))

    card = load_anchor(folder).card
    write_card(folder, replace(card, base_model="elsewhere"), folder / LORA_FILE)
    read_cards(read_samples([str(tmp_path / "run")]))
    write_card(folder, replace(card, steps=7), folder / LORA_FILE)
    message = f"the card of {folder} is another than when {tmp_path / 'run'} was sampled"
    with pytest.raises(ValueError, match=message):
        read_cards(read_samples([str(tmp_path / "run")]))
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")


# Schedulers and anchors

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
"""SD1.5's file: it does not say timestep_spacing, prediction_type and clip_sample."""


def test_schedulers_follow_the_hub_file_and_not_the_class_that_wrote_it(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD15_SCHEDULER))
    base = PNDMScheduler.from_pretrained(tmp_path).config
    names = ("euler_ancestral", "ddim", "ddpm")
    euler, ddim, ddpm = (make_scheduler(name, base) for name in names)
    for scheduler in (euler, ddim, ddpm):
        scheduler.set_timesteps(50)
    # DDIM and DDPM step through the same noise levels
    assert timesteps_digest(ddim) == timesteps_digest(ddpm) != timesteps_digest(euler)
    assert euler.timesteps[0] == 999
    assert float(euler.init_noise_sigma) == pytest.approx(14.61, abs=0.01)
    assert ddim.timesteps[0] == 981
    assert ddim.config.set_alpha_to_one is False
    assert ddim.config.clip_sample is False
    assert ddpm.config.clip_sample is False


def test_saving_the_same_anchor_again_is_no_other_anchor(tmp_path):
    """The order of a safetensors header's metadata is random."""
    card = AnchorCard(base_model="x", family="sd15", method="lora", beta=BETA)

    def digest(scale):
        save_anchor(tmp_path / "anchor", tiny_lora(tiny_pipeline("sd15").unet, scale=scale), card)
        return anchor_digest(tmp_path / "anchor")

    first = digest(1.0)
    assert [digest(1.0) for _ in range(3)] == [first] * 3
    assert digest(2.0) != first


# Tracking


class RecordingTracker(Tracker):
    """Keeps what it is given, by name or kind."""

    def __init__(self):
        self.given = {}

    def image(self, name, path, caption=""):
        self.given[name] = path

    def table(self, name, columns, rows):
        self.given[name] = (columns, rows)

    def uses(self, name, kind):
        self.given[kind] = name

    def artifact(self, name, kind, path):
        self.given["artifact"] = (name, kind, path)


def test_the_tracker_gets_images_and_where_they_come_from(config, tmp_path, monkeypatch):
    track = RecordingTracker()
    given = track.given

    @contextmanager
    def tracker(tracking, stage, run_dir, settings, main_process, group):
        given["group"] = group
        given["base"] = settings["model"]["base"]
        yield track

    monkeypatch.setattr("sample.sweep.tracker", tracker)
    run(config, tmp_path)

    columns, rows = given["samples"]
    assert columns == ["prompt", "lam=0", "lam=0.5", "lam=1"]
    assert [row[0] for row in rows] == PROMPTS
    assert rows[0][2] == tmp_path / FOX.image((0.5,))
    for row in rows:
        assert all(file.is_file() for file in row[1:])
    assert given["grid"] == tmp_path / "grid.png"
    assert given["model"] == "anchor-sd15-lora", "as train names it"
    manifest = tmp_path / "manifest.jsonl"
    assert given["artifact"] == (f"samples-{tmp_path.name}", "samples", manifest), "as eval does"
    assert given["group"] == slug(given["base"]), "as train and eval"


def test_a_pickled_anchor_is_sampled_where_the_key_allows_it(tiny, config, tmp_path):
    # The full anchor, its network a pickle.
    anchor = tiny / "sd15-full/anchor"
    shutil.copytree(anchor, tmp_path / "pickled")
    file = next((tmp_path / "pickled/unet").glob("*.safetensors"))
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_suffix(".bin"))
    card = load_anchor(tmp_path / "pickled", read_pickled_tensors=True).card
    (tmp_path / "pickled/anchor.json").write_text(json.dumps(asdict(replace(card, **NO_DIGEST))))
    small = replace(config, lambdas=[1.0], prompts=["a red fox"])
    pickled = replace(small, anchor=str(tmp_path / "pickled"))

    # Without the key the refusal names it, and not the function of the library.
    message = r"is a pickle .*: give read_pickled_tensors=true, which reads its tensors"
    with pytest.raises(ValueError, match=message):
        run(pickled, tmp_path / "refused")

    # With it the images are those of the same weights in safetensors.
    pickled = replace(pickled, read_pickled_tensors=True)
    run(pickled, tmp_path / "read")
    run(replace(small, anchor=str(anchor)), tmp_path / "plain")
    assert difference(read_images(tmp_path / "read"), read_images(tmp_path / "plain")) == 0

    # Other weights in a file of the same name are another anchor.
    torch.save({name: 2 * tensor for name, tensor in weights.items()}, file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="anchor_sha256"):
        run(pickled, tmp_path / "read")
