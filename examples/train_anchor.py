"""Train an anchor on preference pairs, in a page: what `python -m train` does, without a cache.

    python examples/train_anchor.py                      # the shapes world, seconds on a CPU
    python examples/train_anchor.py --pairs mine.parquet --base <folder or hub id> --resolution 512

The pairs are a parquet file with the columns winner and loser (images) and caption, or those of
Pick-a-Pic. The command line does the same, keeps its cache, and follows the published recipes:

    python -m train data=table data.path=mine.parquet model.base=<folder or hub id> dpo.beta=500
"""

from __future__ import annotations

import argparse
from pathlib import Path

from accelerate import Accelerator
from peft import LoraConfig

import deradiff
from deradiff.data.pairs import Examples, Pairs
from deradiff.models.base_model import BaseModel
from deradiff.training.dpo import learning_rate
from deradiff.training.loop import train
from deradiff.training.objectives.diffusion import DPO
from deradiff.training.options import TrainingOptions
from deradiff.worlds import shapes


def train_anchor(
    pairs: Path, base: BaseModel, folder: Path, resolution: int, steps: int, beta: float
) -> Path:
    """Align a base model by Diffusion-DPO with a LoRA; returns the anchor's folder."""
    # The reference is the base model itself: the same network with its adapter switched off.
    pipe = base.load_pipeline()
    denoiser = getattr(pipe, base.family.denoiser)
    denoiser.requires_grad_(False)
    targets = list(base.family.lora_targets)
    denoiser.add_adapter(LoraConfig(r=16, lora_alpha=160, target_modules=targets))

    # What is trained, and what the anchor's card says of it.
    card = deradiff.AnchorCard(
        base_model=base.source, family=base.family.name, method="lora", beta=beta, steps=steps
    )
    objective = DPO(pipe, resolution, caption_dropout=0.1, card=card)

    # A small beta allows the model to move further, and gets a larger rate.
    options = TrainingOptions(
        steps=steps,
        pairs_per_step=8,
        batch_size=8,
        learning_rate=learning_rate(1e-4, "inverse_beta", beta),
        log_every=5,
    )
    examples = Examples(Pairs(str(pairs)), seed=0)
    train(objective, examples, options, folder, Accelerator())

    deradiff.save_anchor(folder / "anchor", objective.network, card)
    return folder / "anchor"


def main() -> None:
    """Train, and sample the base model and the anchor on the same noise."""
    parser = argparse.ArgumentParser(description="Train an anchor on preference pairs.")
    parser.add_argument("--pairs", type=Path, help="a parquet file; default: the shapes world")
    parser.add_argument("--base", default="asset:shapes/base", help="the base model")
    parser.add_argument("--resolution", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--beta", type=float, default=500.0, help="a small one aligns strongly")
    parser.add_argument("--folder", type=Path, default=Path("runs/train_anchor"))
    arguments = parser.parse_args()

    # Pairs: here of drawn scenes, of which the more vivid one wins.
    pairs = arguments.pairs
    if pairs is None:
        pairs = arguments.folder / "pairs.parquet"
        shapes.write_pairs(pairs, count=64, seed=0, reward="vivid")

    base = BaseModel(arguments.base)
    anchor = train_anchor(
        pairs, base, arguments.folder, arguments.resolution, arguments.steps, arguments.beta
    )

    # lam = 0 is the base model, 1 the anchor, 0.5 imitates one that was trained at twice the beta.
    pipe = base.load_pipeline()
    caption = Pairs(str(pairs)).captions[0]
    with deradiff.realign(pipe, anchor, lam=0.5):
        size = {"height": arguments.resolution, "width": arguments.resolution}
        image = pipe(caption, num_inference_steps=10, **size).images[0]
    image.save(arguments.folder / "image.png")
    print(f"{anchor} is trained; {arguments.folder / 'image.png'} shows {caption!r} at lam=0.5")


if __name__ == "__main__":
    main()
