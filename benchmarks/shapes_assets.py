"""The shipped models of the shapes world: measured, written as fp16, and compared with what the
experiments make now.

python -m benchmarks.shapes_assets ship      writes deradiff/worlds/assets/shapes from
runs/train/shapes-* and measures it
python -m benchmarks.shapes_assets compare   measures runs/train/shapes-* and compares it with what
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
from deradiff.data.pairs import image_tensor
from deradiff.files import ASSETS, write_atomic
from deradiff.models.base_model import BaseModel
from deradiff.scorers import load_scorer
from deradiff.worlds import shapes

SHIPPED = ASSETS / "shapes"
TOLERANCE = (
    0.05  # of a share, and of a PSNR in tens of dB: what another processor's arithmetic may move
)
RUNS = {
    "base": "shapes-base/pipeline",
    "clip": "shapes-clip/clip",
    "pickscore": "shapes-pickscore/clip",
    "hpsv2": "shapes-hpsv2/clip",
}


def renders(count: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Fresh pictures of random captions, held-out ones among them."""
    rng = np.random.default_rng([seed, 7])
    scenes = [shapes.SCENES[i] for i in rng.integers(0, len(shapes.SCENES), count)]
    return [Image.fromarray(p) for p in shapes.render(scenes, rng)], [str(s) for s in scenes]


@torch.no_grad()
def zero_shot(scorer: Any, images: list[Image.Image], captions: list[str]) -> float:
    """Share of pictures whose own caption scores highest among all 300."""
    scores = scorer.encode_images(images) @ scorer.encode_prompts(shapes.CAPTIONS).T
    return float(
        np.mean([shapes.CAPTIONS[i] == c for i, c in zip(scores.argmax(1).tolist(), captions)])
    )


def ordered(scorer: Any, reward: Any, count: int = 1000) -> float:
    """Share of pairs of one caption that a scorer orders as a reward does."""
    rng = np.random.default_rng(11)
    captions = [str(c) for c in rng.choice(shapes.CAPTIONS, count)]
    scenes = [shapes.scene_of(c) for c in captions]
    sides = [[Image.fromarray(p) for p in shapes.render(scenes, rng)] for _ in range(2)]
    by = [(f(sides[0], captions) - f(sides[1], captions)).numpy() > 0 for f in (scorer, reward)]
    return float(np.mean(by[0] == by[1]))


def sampled(base: Path, captions: list[str]) -> list[Image.Image]:
    """One picture a caption, as the sample stage makes them by default: 20 steps, guidance 2.5, but
    DDIM."""
    pipe = BaseModel(str(base)).load_pipeline()
    images: list[Image.Image] = []
    for start in range(0, len(captions), 64):
        part = captions[start : start + 64]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(
            part,
            num_inference_steps=20,
            guidance_scale=2.5,
            height=32,
            width=32,
            generator=generators,
        ).images
    return images


def measure(folders: dict[str, Path]) -> dict[str, float]:
    """Every figure that the README and the tests hold the shipped models to."""
    scorers = {
        name: load_scorer(name, str(folders[name])) for name in ("clip", "pickscore", "hpsv2")
    }
    images, captions = renders(300, seed=0)
    vae = BaseModel(str(folders["base"])).load_pipeline().vae
    with torch.no_grad():
        clean = torch.stack([image_tensor(i, 32) for i in images])
        error = vae.decode(vae.encode(clean).latent_dist.mean).sample - clean
    asked = [*shapes.held_out_captions(), *shapes.training_captions()]
    drawn, judge = sampled(folders["base"], asked), train_judge()
    right, truth = verdicts(judge, drawn, asked), verdicts(judge, images, captions)
    held = len(shapes.held_out_captions())
    found = {
        "autoencoder_psnr_db": float(-10 * (error.square().mean() / 4).log10()),
        "clip_zero_shot_renders": zero_shot(scorers["clip"], images, captions),
        "clip_zero_shot_samples": zero_shot(scorers["clip"], drawn, asked),
        "pickscore_orders_as_vivid": ordered(scorers["pickscore"], shapes.vivid),
        "hpsv2_orders_as_crisp": ordered(scorers["hpsv2"], shapes.crisp),
        "judge_renders_all": float(truth["all"].mean()),
        "judge_samples_all": float(right["all"].mean()),
        "judge_samples_all_held_out_captions": float(right["all"][:held].mean()),
    }
    found |= {
        f"judge_samples_{head}": float(right[head].mean())
        for head in ("size", "colour", "shape", "background")
    }
    for size in shapes.RADII:
        for shape in shapes.SHAPES:
            chosen = [
                shapes.scene_of(c).size == size and shapes.scene_of(c).shape == shape for c in asked
            ]
            found[f"judge_samples_shape_{size}_{shape}"] = float(right["shape"][chosen].mean())
    return {k: round(v, 4) for k, v in found.items()}


def ship(runs: Path) -> None:
    shutil.rmtree(SHIPPED, ignore_errors=True)
    pipe = BaseModel(str(runs / RUNS["base"])).load_pipeline()
    pipe.to(torch.float16)
    # transformers loads what is stored, diffusers float32: a plain from_pretrained must give one
    # precision
    pipe.text_encoder.float()
    pipe.save_pretrained(SHIPPED / "base")
    from deradiff.worlds.networks import load_clip

    for name in ("clip", "pickscore", "hpsv2"):
        model, tokenizer, processor = load_clip(str(runs / RUNS[name]))
        for part in (model.half(), tokenizer, processor):
            part.save_pretrained(SHIPPED / name)
    figures = measure({name: SHIPPED / name for name in RUNS})
    write_atomic(SHIPPED / "metrics.json", json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def compare(runs: Path) -> None:
    shipped, now = (
        json.loads((SHIPPED / "metrics.json").read_text()),
        measure({name: runs / path for name, path in RUNS.items()}),
    )
    far = {
        k: (shipped[k], v)
        for k, v in now.items()
        if abs(v - shipped[k]) > TOLERANCE * (10 if k.endswith("_db") else 1)
    }
    for name, value in now.items():
        print(f"{name:42} shipped {shipped[name]:8.4f}   now {value:8.4f}")
    if far:
        sys.exit(
            f"the experiments no longer make what is shipped: {', '.join(far)} differ by more "
            f"than {TOLERANCE}"
        )


if __name__ == "__main__":
    commands = {"ship": ship, "compare": compare}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit("type python -m benchmarks.shapes_assets ship, or compare")
    commands[sys.argv[1]](Path("runs/train"))
