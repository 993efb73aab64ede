"""The sample stage on tiny pipelines in the formats of SD1.5 and SDXL: the images, the manifest, resuming, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image

import sample.sweep
from configs.tracking import Tracker, TrackingConfig
from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.data.prompts import Prompt, prompt_id
from deradiff.evaluation.manifest import ImageRecord
from deradiff.files import anchor_digest, slug
from deradiff.method.schedulers import make_scheduler
from sample.config import SampleConfig
from sample.manifest import image_path, intact, merge, save_image
from sample.resolve import resolve
from sample.sampling import PromptSeed, load_sampler, timesteps_digest
from sample.stage import run
from tests.support.tiny_pipelines import (
    VISIBLE,
    perturbed_denoiser,
    save_tiny,
    tiny_lora,
    tiny_pipeline,
)

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red fox", "🦊/../fox", "a red fox"]


def generator_seed(text, seed):
    return PromptSeed(Prompt(prompt_id(text), text), seed).generator_seed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with <family>-base and <family>-full/anchor, <family>-lora/anchor for both families."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in ("sd15", "sdxl"):
        base, unet = save_tiny(family, folder / f"{family}-base"), tiny_pipeline(family).unet
        for method, anchor in (
            ("full", perturbed_denoiser(unet, 0.5)),
            ("lora", tiny_lora(unet, scale=VISIBLE)),
        ):
            card = AnchorCard(base_model=str(base), family=family, method=method, beta=2000.0)
            save_anchor(folder / f"{family}-{method}/anchor", anchor, card)
    return folder


@pytest.fixture
def config(tiny):
    return SampleConfig(
        anchor=str(tiny / "sd15-lora/anchor"),
        lambdas=[0.0, 0.5, 1.0],
        prompts=PROMPTS,
        steps=3,
        guidance_scale=3.0,
        tracking=TrackingConfig("none"),
    )


def manifest(run_dir):
    return [json.loads(line) for line in (run_dir / "manifest.jsonl").read_text().splitlines()]


def pixels(run_dir):
    return {
        r["image"]: np.asarray(Image.open(run_dir / r["image"])).astype(int)
        for r in manifest(run_dir)
    }


def difference(one, other):
    assert one.keys() == other.keys()
    return max(abs(one[name] - other[name]).max() for name in one)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral"])
@pytest.mark.parametrize("anchor", ["sd15-full", "sdxl-lora"])
def test_reference_and_anchor_are_the_stock_pipelines(tiny, config, tmp_path, anchor, sampler):
    config = replace(
        config, anchor=str(tiny / anchor / "anchor"), sampler=sampler, prompts=PROMPTS[:1]
    )
    run(config, tmp_path / "run")
    config, base, found = resolve(config)
    images = {}
    for lam in (0.0, 1.0):
        pipe = load_sampler(config, base, torch.device("cpu"))
        if lam and found.method == "lora":
            pipe.load_lora_weights(found.root)
        elif lam:
            pipe.unet = type(pipe.unet).from_pretrained(found.root, subfolder="unet")
        noise = torch.Generator().manual_seed(generator_seed("a red fox", 0))
        images[lam] = np.asarray(
            pipe("a red fox", num_inference_steps=3, guidance_scale=3.0, generator=[noise]).images[
                0
            ]
        )
        made = pixels(tmp_path / "run")[image_path(lam, prompt_id("a red fox"), 0)]
        assert np.array_equal(made, images[lam]), f"lam {lam}"
    half = pixels(tmp_path / "run")[image_path(0.5, prompt_id("a red fox"), 0)]
    assert (
        all(abs(half - image).mean() > 1 for image in images.values())
        and abs(images[0.0].astype(int) - images[1.0]).mean() > 1
    )


def test_the_manifest_keeps_its_contract(config, tmp_path):
    run(replace(config, seeds=[0, 7]), tmp_path)
    records = manifest(tmp_path)
    assert len(records) == len({r["image"] for r in records}) == 3 * 2 * 3
    assert {r["prompt"] for r in records} == set(PROMPTS) and len(
        {r["prompt_id"] for r in records}
    ) == 3
    for r in records:
        assert r["image"] == f"lam={r['lam']:.2f}/{r['prompt_id']}-s{r['seed']}.png" and Image.open(
            tmp_path / r["image"]
        ).size == (64, 64)
        assert (
            r["beta"] == 2000
            and r["beta_target"] == {0.0: None, 0.5: 4000.0, 1.0: 2000.0}[r["lam"]]
        )
        assert (
            r["mode"],
            r["sampler"],
            r["steps"],
            r["guidance_scale"],
            r["height"],
            r["width"],
        ) == (
            "exact",
            "euler_ancestral",
            3,
            3.0,
            64,
            64,
        )
        assert r["anchor"] == config.anchor
        image = PromptSeed(Prompt(r["prompt_id"], r["prompt"]), r["seed"])
        assert r["generator_seed"] == image.generator_seed
        assert set(ImageRecord.__annotations__) <= set(r), "one schema for writer and reader"
        assert r["path_kl"] == 0 if r["lam"] == 0 else r["path_kl"] > 0
    assert intact(tmp_path) == {r["image"] for r in records}
    by_lam = [sorted(r["path_kl"] for r in records if r["lam"] == lam) for lam in (0.5, 1.0)]
    assert all(half < whole for half, whole in zip(*by_lam))
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 3 * 192 and grid.height > 3 * 192
    assert not list(tmp_path.glob("*.part"))


def test_path_kl_is_null_where_it_was_not_paid_for(config, tmp_path):
    run(replace(config, path_kl=False), tmp_path / "exact")
    assert all((r["path_kl"] is None) == (r["lam"] == 1) for r in manifest(tmp_path / "exact"))
    run(replace(config, path_kl=True, mode="weights"), tmp_path / "weights")
    assert all(
        r["path_kl"] > 0 and r["mode"] == "weights"
        for r in manifest(tmp_path / "weights")
        if r["lam"]
    )


def test_an_image_depends_on_prompt_seed_and_lambda_alone(config, tmp_path):
    config = replace(config, seeds=[0, 1])
    run(replace(config, batch_size=6), tmp_path / "together")
    run(
        replace(config, batch_size=1, prompts=PROMPTS[::-1], lambdas=[1.0, 0.0, 0.5], seeds=[1, 0]),
        tmp_path / "alone",
    )
    together, alone = pixels(tmp_path / "together"), pixels(tmp_path / "alone")
    assert difference(together, alone) <= 1
    reference = [image for name, image in together.items() if name.startswith("lam=0.00")]
    assert all(abs(a - b).mean() > 1 for i, a in enumerate(reference) for b in reference[:i]), (
        "other prompts and seeds get other noise"
    )


@pytest.mark.slow
def test_two_ranks_make_the_same_images_as_one_process(tiny, config, tmp_path):
    run(config, tmp_path / "one")
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "sample",
        f"anchor={config.anchor}",
        "lambdas=[0,0.5,1]",
        "prompts=['a red fox','🦊/../fox','a red fox']",
        "steps=3",
        "guidance_scale=3",
        "tracking=none",
        f"runs={tmp_path}/runs",
        "name=two",
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 prompts x 1 seeds x 3 lambdas") == 1, "one rank speaks"
    assert "6 images a process" in done.stdout, (
        "two prompts are the first rank's and one the second's"
    )
    assert difference(pixels(tmp_path / "one"), pixels(tmp_path / "runs/sample/two")) <= 1
    assert [r["image"] for r in manifest(tmp_path / "one")] == [
        r["image"] for r in manifest(tmp_path / "runs/sample/two")
    ]


class Killed(BaseException):
    pass


def test_a_killed_run_loses_nothing_and_the_same_command_makes_the_rest(
    config, tmp_path, monkeypatch
):
    run(config, tmp_path / "whole")
    made = []

    def save_some(*arguments, limit=4):
        if len(made) == limit:
            raise Killed
        save_image(*arguments)
        made.append(arguments[-1]["image"])

    config = replace(config, batch_size=2)
    monkeypatch.setattr("sample.sweep.save_image", save_some)
    with pytest.raises(Killed):
        run(config, tmp_path / "killed")
    assert not manifest(tmp_path / "killed") and len(made) == 4
    first = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in made}
    monkeypatch.setattr(
        "sample.sweep.save_image", lambda *arguments: save_some(*arguments, limit=99)
    )
    run(config, tmp_path / "killed")
    assert len(made) == 9 and len(set(made)) == 9, "no image is made twice"
    assert {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in first} == first
    assert difference(pixels(tmp_path / "whole"), pixels(tmp_path / "killed")) <= 1


def test_what_is_done_is_skipped_what_is_damaged_or_new_is_made(config, tmp_path, monkeypatch):
    run(config, tmp_path)
    before = (tmp_path / "manifest.jsonl").read_bytes()
    loaded = []
    monkeypatch.setattr(
        "sample.sweep.load_sampler",
        lambda *arguments: loaded.append(1) or load_sampler(*arguments),
    )
    run(config, tmp_path)
    assert not loaded and (tmp_path / "manifest.jsonl").read_bytes() == before, (
        "nothing to do loads no weights"
    )
    records = manifest(tmp_path)
    before_pixels = pixels(tmp_path)
    (tmp_path / records[0]["image"]).write_bytes(b"damaged")
    (tmp_path / records[1]["image"]).unlink()
    kept = tmp_path / records[2]["image"]
    age = kept.stat().st_mtime_ns
    run(replace(config, lambdas=[0.25, 1.0], seeds=[0, 1]), tmp_path)
    run(config, tmp_path)
    assert kept.stat().st_mtime_ns == age
    after = manifest(tmp_path)
    same = [
        key for key in records[0] if key not in ("seconds", "evaluations", "path_kl", "sha256")
    ]  # a smaller batch rounds otherwise
    kept = [r for r in after if r["lam"] != 0.25 and r["seed"] == 0]
    assert (
        difference(
            {name: image for name, image in pixels(tmp_path).items() if name in before_pixels},
            before_pixels,
        )
        <= 1
    )
    assert [[r[key] for key in same] for r in kept] == [
        [r[key] for key in same] for r in records
    ] and len(after) == 9 + 3 + 6


def test_a_line_that_a_kill_cut_short_is_not_read(tmp_path):
    record = {"image": "lam=0.00/a-s0.png", "prompt_id": "a", "seed": 0, "lam": 0.0}
    save_image(tmp_path, 3, b"one", record)
    with open(tmp_path / "manifest.3.part", "a") as part:
        part.write('{"image": "lam=0.50/a-s0')
    save_image(tmp_path, 0, b"gone", record | {"image": "lam=1.00/a-s0.png", "lam": 1.0})
    (tmp_path / "lam=1.00/a-s0.png").unlink()
    assert [r["image"] for r in merge(tmp_path)] == ["lam=0.00/a-s0.png"]
    assert intact(tmp_path) == {"lam=0.00/a-s0.png"} and not list(tmp_path.glob("*.part"))


def test_distinct_lambdas_never_share_a_folder():
    lambdas = [0.0, 0.5, 1.0, 0.125, 0.12, 0.1, 0.1 + 1e-12, 1e-5, 10.0, 1 / 3]
    assert len({image_path(lam, "a", 0) for lam in lambdas}) == len(lambdas)
    assert (
        image_path(0.5, "a", 3) == "lam=0.50/a-s3.png"
        and image_path(0.125, "a", 0) == "lam=0.125/a-s0.png"
    )


def test_schedulers_follow_the_hub_file_and_not_the_class_that_wrote_it(tmp_path):
    published = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }  # (SD1.5's, which says nothing of timestep_spacing, prediction_type and clip_sample)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(published))
    base = PNDMScheduler.from_pretrained(tmp_path).config
    euler, ddim, ddpm = (make_scheduler(name, base) for name in ("euler_ancestral", "ddim", "ddpm"))
    for scheduler in (euler, ddim, ddpm):
        scheduler.set_timesteps(50)
    digests = {timesteps_digest(scheduler) for scheduler in (euler, ddim, ddpm)}
    assert len(digests) == 2, "DDIM and DDPM step through the same noise levels"
    assert euler.timesteps[0] == 999 and float(euler.init_noise_sigma) == pytest.approx(
        14.61, abs=0.01
    )
    assert ddim.timesteps[0] == 981 and ddim.config.set_alpha_to_one is False
    assert ddim.config.clip_sample is False and ddpm.config.clip_sample is False


def test_saving_the_same_anchor_again_is_no_other_anchor(tmp_path):
    digests = set()
    for scale in (
        1.0,
        1.0,
        1.0,
        1.0,
        2.0,
    ):  # the order of a safetensors header's metadata is random
        card = AnchorCard(base_model="x", family="sd15", method="lora", beta=2000.0)
        save_anchor(tmp_path / "anchor", tiny_lora(tiny_pipeline("sd15").unet, scale=scale), card)
        digests.add(anchor_digest(tmp_path / "anchor"))
    assert len(digests) == 2


def test_the_tracker_gets_pictures_and_where_they_come_from(config, tmp_path, monkeypatch):
    tracked = Tracker()
    tracked.image = lambda name, path, caption="": seen.update({name: path})
    tracked.table = lambda name, columns, rows: seen.update({name: (columns, rows)})
    tracked.uses = lambda name, kind: seen.update({kind: name})
    tracked.artifact = lambda name, kind, path: seen.update(artifact=(name, kind, path))
    seen = {}

    class Opened:
        def __init__(self, tracking, stage, run_dir, settings, main_process, group):
            seen.update(group=group, base=settings["model"]["base"])

        def __enter__(self):
            return tracked

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(sample.sweep, "tracker", Opened)
    run(config, tmp_path)
    columns, rows = seen["samples"]
    assert (
        columns == ["prompt", "lam=0", "lam=0.5", "lam=1"] and [row[0] for row in rows] == PROMPTS
    )
    assert rows[0][2] == tmp_path / image_path(0.5, prompt_id("a red fox"), 0) and all(
        cell.is_file() for row in rows for cell in row[1:]
    )
    assert seen["grid"] == tmp_path / "grid.png"
    assert seen["model"] == "anchor-sd15-lora", "train's name for it"
    assert seen["artifact"] == (
        f"samples-{tmp_path.name}",
        "samples",
        tmp_path / "manifest.jsonl",
    ), "eval's name for them"
    assert seen["group"] == slug(seen["base"]), "as train and eval"
