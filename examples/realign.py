"""The dial in a stock diffusers pipeline: what lambda can be, and what it costs.

    python examples/realign.py                         # the shapes world, half a minute on a CPU
    python examples/realign.py --anchor runs/train/mine/anchor --prompt "a red fox in the snow"

Without --anchor, `train_anchor.py` beside this file trains a small one first. The anchor's card
names the base model; this example is for the UNets of SD1.5, SDXL and the shapes world.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from train_anchor import train_anchor

import deradiff
from deradiff.models.base_model import BaseModel
from deradiff.realignment.registry import MODES
from deradiff.training.panel import tile
from deradiff.worlds import shapes

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_anchor(folder: Path) -> Path:
    """Align the shapes world's base model to vivid images, for a few steps."""
    pairs = folder / "pairs.parquet"
    shapes.write_pairs(pairs, count=64, seed=0, reward="vivid")
    base = BaseModel("asset:shapes/base")
    return train_anchor(pairs, base, folder, resolution=32, steps=20, beta=500.0)


def sample(pipe: Any, prompt: str, steps: int, images: int = 1) -> list[Any]:
    """Images of one prompt, always from the same noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return pipe([prompt] * images, num_inference_steps=steps, generator=generators).images


def sweep(pipe: Any, anchor: Path | str, prompt: str, steps: int) -> list[Any]:
    """One image for each lambda: the same noise, aligned more and more strongly."""
    row = []
    with deradiff.realign(pipe, anchor, lam=0.0, path_kl=True, shared_start=True) as dial:
        for lam in LAMBDAS:
            dial.lam = lam
            row += sample(pipe, prompt, steps)
            print(
                f"lam {lam:<5g} path KL {dial.path_kl.item():<9.3g} nats  "
                f"{dial.evaluations:.2f} network evaluations a step"
            )
    return row


def other_lambdas(pipe: Any, anchor: Path | str, prompt: str, steps: int) -> list[Any]:
    """Lambda over time, over the images of a batch, and over the regions of an image."""
    row = []
    with deradiff.realign(pipe, anchor, lam=0.5) as dial:
        # Over time: strong in the pure noise, weak near the image.
        dial.lam = deradiff.ramp(1.0, 0.2)
        row += sample(pipe, prompt, steps)

        # One for each image of a batch.
        dial.lam = torch.tensor([0.0, 0.5, 1.0])
        row += sample(pipe, prompt, steps, images=3)

        # A mask over the latents: the anchor on the left, the reference on the right.
        side = pipe.unet.config.sample_size
        mask = torch.ones(side, side)
        mask[:, side // 2 :] = 0
        dial.lam = mask
        row += sample(pipe, prompt, steps)
    return row


def beyond_and_apart(pipe: Any, anchor: Path | str, prompt: str, steps: int) -> list[Any]:
    """Lambda below 0, above 1, and of one branch of guidance; and four particles at lambda 0.5."""
    row = []
    # Each of these is warned of once, for what it imitates or not: docs/dial.md says it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with deradiff.realign(pipe, anchor, lam=-0.5) as dial:
            row += sample(pipe, prompt, steps)
            dial.lam = 2.0
            row += sample(pipe, prompt, steps)
            dial.lam = deradiff.ByBranch(conditional=1.0, unconditional=0.0)
            row += sample(pipe, prompt, steps)

        # The first image of a group of four is the fair draw.
        with deradiff.realign(pipe, anchor, lam=0.5, particles=4):
            row += sample(pipe, prompt, steps, images=4)[:1]
    return row


def compare_modes(pipe: Any, anchor: Path | str, prompt: str, steps: int) -> list[Any]:
    """The same lambda in every mode: cheaper ones approximate mode exact."""
    row = []
    for mode in MODES:
        with deradiff.realign(pipe, anchor, lam=0.5, mode=mode) as dial:
            row += sample(pipe, prompt, steps)
            print(f"mode {mode:<8} {dial.evaluations:.2f} network evaluations a step")
    return row


def main() -> None:
    """Sample, print what it cost, and write a grid of the images."""
    parser = argparse.ArgumentParser(description="Turn the dial in a stock pipeline.")
    parser.add_argument("--anchor", help="one with a card; default: a new one")
    parser.add_argument("--prompt", default="a large red circle on a white background")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/realign"))
    arguments = parser.parse_args()

    # The base model that the anchor was aligned from, as diffusers loads it.
    arguments.folder.mkdir(parents=True, exist_ok=True)
    anchor = arguments.anchor or make_anchor(arguments.folder)
    card = deradiff.load_anchor(anchor).card
    pipe = BaseModel(card.base_model, card.base_revision).load_pipeline()

    options = (pipe, anchor, arguments.prompt, arguments.steps)
    before = sample(pipe, arguments.prompt, arguments.steps)
    rows = [sweep(*options), other_lambdas(*options)]
    rows += [beyond_and_apart(*options), compare_modes(*options)]

    # Outside the context the pipeline is the reference again, bit for bit.
    after = sample(pipe, arguments.prompt, arguments.steps)
    assert before[0].tobytes() == after[0].tobytes() == rows[0][0].tobytes()

    # A short row has copies of its last image to fill the grid.
    for row in rows:
        row += [row[-1]] * (len(LAMBDAS) - len(row))
    titles = [
        "lambda " + ", ".join(f"{lam:g}" for lam in LAMBDAS),
        "a ramp; lambda 0, 0.5 and 1 in one batch; a mask",
        "lambda -0.5; 2; 1 on the conditional branch; 0.5 with four particles",
        "lambda 0.5 in the modes " + ", ".join(MODES),
    ]
    tile(rows, titles, [""] * len(LAMBDAS)).save(arguments.folder / "grid.png")
    print(f"see {arguments.folder / 'grid.png'}")


if __name__ == "__main__":
    main()
