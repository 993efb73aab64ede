"""The shipped models of the shapes world: measured, written in half precision, and compared.

python -m benchmarks.shapes_assets ship      write deradiff/worlds/assets/shapes from
                                             runs/train/shapes-*, and measure it
python -m benchmarks.shapes_assets compare   measure runs/train/shapes-*, and compare it with what
                                             is shipped
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.judge import train_judge, verdicts
from deradiff.assets import ASSETS
from deradiff.data.pairs import image_tensor
from deradiff.files import write_atomic
from deradiff.models.base_model import BaseModel
from deradiff.scorers import load_scorer
from deradiff.worlds import shapes
from deradiff.worlds.networks import load_clip

SHIPPED = ASSETS / "shapes"

TOLERANCE = 0.05
"""How far a share may move on another processor; decibels may move ten times as far."""

RUNS = {
    "base": "shapes-base/pipeline",
    "clip": "shapes-clip/clip",
    "pickscore": "shapes-pickscore/clip",
    "hpsv2": "shapes-hpsv2/clip",
}
"""The trained models, below the folder of train's runs."""

SCORERS = ("clip", "pickscore", "hpsv2")
BATCH = 64
"""Images that are sampled at once."""


def renders(count: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Fresh images of random captions, held-out ones among them, and the captions."""
    rng = np.random.default_rng([seed, 7])
    scenes = [shapes.SCENES[i] for i in rng.integers(0, len(shapes.SCENES), count)]
    images = [Image.fromarray(pixels) for pixels in shapes.render(scenes, rng)]
    return images, [str(scene) for scene in scenes]


@torch.no_grad()
def zero_shot(scorer: Any, images: list[Image.Image], captions: list[str]) -> float:
    """Share of images whose own caption scores highest among all 300."""
    scores = scorer.encode_images(images) @ scorer.encode_prompts(shapes.CAPTIONS).T
    best = [shapes.CAPTIONS[i] for i in scores.argmax(1).tolist()]
    return float(np.mean([guess == caption for guess, caption in zip(best, captions)]))


def ordered(scorer: Any, reward: Any, count: int = 1000) -> float:
    """Share of pairs of one caption that a scorer orders as a reward does."""
    # Two renders of each caption.
    rng = np.random.default_rng(11)
    captions = [str(caption) for caption in rng.choice(shapes.CAPTIONS, count)]
    scenes = [shapes.scene_of(caption) for caption in captions]
    first = [Image.fromarray(pixels) for pixels in shapes.render(scenes, rng)]
    second = [Image.fromarray(pixels) for pixels in shapes.render(scenes, rng)]

    # Which of the two each judge prefers.
    prefers_first = []
    for judge in (scorer, reward):
        difference = judge(first, captions) - judge(second, captions)
        prefers_first.append(difference.numpy() > 0)
    return float(np.mean(prefers_first[0] == prefers_first[1]))


def sampled(base: Path, captions: list[str]) -> list[Image.Image]:
    """One image of each caption, by DDIM in 20 steps with guidance 2.5.

    Args:
        base: the folder of the base model.
        captions: in their order; an image depends on its number.
    """
    pipe = BaseModel(str(base)).load_pipeline()
    images: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        output = pipe(
            batch,
            num_inference_steps=20,
            guidance_scale=2.5,
            height=32,
            width=32,
            generator=generators,
        )
        images += output.images
    return images


@torch.no_grad()
def autoencoder_psnr(vae: Any, images: list[Image.Image]) -> float:
    """Signal to noise of the reconstruction, in dB."""
    clean = torch.stack([image_tensor(image, 32) for image in images])
    error = vae.decode(vae.encode(clean).latent_dist.mean).sample - clean
    return float(-10 * (error.square().mean() / 4).log10())  # images span 2, from -1 to 1


def measure(folders: dict[str, Path]) -> dict[str, float]:
    """Every figure that the README and the tests hold the shipped models to.

    Args:
        folders: of the models, by the keys of RUNS.
    """
    # Renders, and what the base model samples from all captions, held-out ones first.
    scorers = {name: load_scorer(name, str(folders[name])) for name in SCORERS}
    images, captions = renders(300, seed=0)
    vae = BaseModel(str(folders["base"])).load_pipeline().vae
    psnr = autoencoder_psnr(vae, images)
    held_out = shapes.held_out_captions()
    prompts = [*held_out, *shapes.training_captions()]
    samples = sampled(folders["base"], prompts)

    # The judge's verdicts.
    judge = train_judge()
    on_samples = verdicts(judge, samples, prompts)
    on_renders = verdicts(judge, images, captions)
    figures = {
        "autoencoder_psnr_db": psnr,
        "clip_zero_shot_renders": zero_shot(scorers["clip"], images, captions),
        "clip_zero_shot_samples": zero_shot(scorers["clip"], samples, prompts),
        "pickscore_orders_as_vivid": ordered(scorers["pickscore"], shapes.vivid),
        "hpsv2_orders_as_crisp": ordered(scorers["hpsv2"], shapes.crisp),
        "judge_renders_all": float(on_renders["all"].mean()),
        "judge_samples_all": float(on_samples["all"].mean()),
        "judge_samples_all_held_out_captions": float(on_samples["all"][: len(held_out)].mean()),
    }
    for head in ("size", "colour", "shape", "background"):
        figures[f"judge_samples_{head}"] = float(on_samples[head].mean())
    figures |= _by_shape(on_samples["shape"], prompts)
    return {name: round(value, 4) for name, value in figures.items()}


def _by_shape(right: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """The share of right shapes (N,) among the prompts of each size and shape."""
    scenes = [shapes.scene_of(prompt) for prompt in prompts]
    shares = {}
    for size in shapes.RADII:
        for shape in shapes.SHAPES:
            chosen = [scene.size == size and scene.shape == shape for scene in scenes]
            shares[f"judge_samples_shape_{size}_{shape}"] = float(right[chosen].mean())
    return shares


def ship(runs: Path) -> None:
    """Write the models in half precision, with their figures.

    Args:
        runs: the folder of train's runs.
    """
    shutil.rmtree(SHIPPED, ignore_errors=True)
    pipe = BaseModel(str(runs / RUNS["base"])).load_pipeline()
    pipe.to(torch.float16)
    # transformers loads what is stored, diffusers float32: a plain from_pretrained must give one
    # precision.
    pipe.text_encoder.float()
    pipe.save_pretrained(SHIPPED / "base")

    for name in SCORERS:
        model, tokenizer, processor = load_clip(str(runs / RUNS[name]))
        for part in (model.half(), tokenizer, processor):
            part.save_pretrained(SHIPPED / name)

    figures = measure({name: SHIPPED / name for name in RUNS})
    write_atomic(SHIPPED / "metrics.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def tolerance_of(figure: str) -> float:
    """How far a figure may be from the shipped one."""
    return 10 * TOLERANCE if figure.endswith("_db") else TOLERANCE


def compare(runs: Path) -> None:
    """Compare the figures of newly trained models with the shipped ones; exit where they differ.

    Args:
        runs: the folder of train's runs.
    """
    shipped = json.loads((SHIPPED / "metrics.json").read_text())
    figures = measure({name: runs / path for name, path in RUNS.items()})
    for name, value in figures.items():
        print(f"{name:42} shipped {shipped[name]:8.4f}   now {value:8.4f}")

    far = []
    for name, value in figures.items():
        if abs(value - shipped[name]) > tolerance_of(name):
            far.append(name)
    if far:
        sys.exit(
            "the experiments no longer make what is shipped: "
            f"{', '.join(far)} differ by more than {TOLERANCE}"
        )


if __name__ == "__main__":
    commands = {"ship": ship, "compare": compare}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit("type python -m benchmarks.shapes_assets ship, or compare")
    commands[sys.argv[1]](Path("runs/train"))
