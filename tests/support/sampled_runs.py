"""What the tests of the evaluation share: sample runs, a counting scorer, calls of the stage.

The sample runs are as the sample stage leaves them, but their images are drawn and not sampled:
how vivid an image is follows from how strongly it is aligned.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.tracking import TrackingConfig
from deradiff.anchors.anchor import LORA_FILE, AnchorCard
from deradiff.worlds.shapes import BACKGROUNDS, HUES, held_out_captions, rgb_of_hsv, scene_of
from eval.config import EvalConfig, ScorerConfig
from eval.stage import run

LAMBDAS = (0.0, 0.25, 0.5, 1.0, 2.0)

TRAINING = {"steps": 200, "pairs_seen": 3200, "gpu_hours": 0.02, "device": "cpu", "flops": 2e13}
"""What the card of an anchor says of its training."""

SAMPLING = {"sampler": "ddim", "steps": 20, "guidance_scale": 2.5, "height": 32, "width": 32}
"""What the manifest says of the sampling."""


def draw_image(caption: str, seed: int, strength: float, edge_width: float = 1.0) -> bytes:
    """A 32-pixel disc as PNG, more saturated the larger the strength.

    Where it lies depends on caption and seed alone.

    Args:
        caption: of the shapes world.
        seed: of the image.
        strength: 1000 lam / beta.
        edge_width: pixels from the disc to its background.
    """
    scene = scene_of(caption)
    rng = np.random.default_rng([seed, zlib.crc32(caption.encode())])
    x, y = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
    distance = np.hypot(x - rng.normal(), y - rng.normal())
    cover = np.clip(0.5 - (distance - 10) / edge_width, 0, 1)[..., None]
    saturation = 0.35 + 0.2 * rng.uniform() + 0.45 * (1 - np.exp(-strength))
    colour = rgb_of_hsv(np.array([HUES[scene.colour]]), np.array([saturation]), np.array([0.9]))
    values = cover * colour + (1 - cover) * np.array(BACKGROUNDS[scene.background])
    buffer = io.BytesIO()
    Image.fromarray((255 * values).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_run(
    root: Path,
    beta: float,
    training_seed: int = 0,
    lambdas: tuple[float, ...] = LAMBDAS,
    mode: str = "exact",
    prompts: int = 6,
    seeds: int = 2,
    bias: float = 0.0,
    shift: float = 0.0,
    softness: float = 0.0,
    name: str | None = None,
    **overrides: object,
) -> str:
    """Write a sample run below `root`, with its anchor's card.

    Args:
        root: the folder of all runs.
        beta: of the anchor.
        training_seed: of the anchor.
        lambdas: at which it was sampled.
        mode: of realignment.
        prompts: how many.
        seeds: how many images of each prompt and lambda.
        bias: added to the strength of realigned images (lam other than 0 and 1).
        shift: added to the strength of the anchor itself (lam = 1), as a training seed may.
        softness: how many pixels wider an edge is at lam = 1 than the reference's.
        name: of the training run; None: by beta and training seed.
        overrides: of the manifest's values; `prompt` takes the place of every caption.

    Returns:
        The path of the sample run.
    """
    name = name or f"shapes-beta{beta:g}-seed{training_seed}"
    anchor = root / "train" / name / "anchor"
    folder = root / "sample" / f"{name}-{mode}"
    _write_anchor(anchor, beta, training_seed)

    lines = []
    for index, caption in enumerate(held_out_captions()[:prompts]):
        for seed, lam in itertools.product(range(seeds), lambdas):
            # The image
            strength = 1000 * lam / beta
            if lam == 1:
                strength += shift
            elif lam:
                strength += bias
            png = draw_image(caption, seed, strength, 1 + softness * abs(lam))
            image = f"lam={lam:.2f}/p{index}-s{seed}.png"
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            (folder / image).write_bytes(png)

            # Its line of the manifest
            line = {
                "image": image,
                "sha256": hashlib.sha256(png).hexdigest(),
                "prompt_id": f"p{index}",
                "prompt": caption,
                "seed": seed,
                "anchor": str(anchor),
                "beta": beta,
                "lam": lam,
                "beta_target": beta / lam if lam else None,
                "mode": mode,
                **SAMPLING,
                "generator_seed": 100 * index + seed,
                "path_kl": 40 * lam**2 * 1000 / beta,
            }
            lines.append(json.dumps(line | overrides, ensure_ascii=False))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def _write_anchor(folder: Path, beta: float, seed: int) -> None:
    """An anchor with a card, and with weights of which only the presence counts."""
    card = AnchorCard(
        base_model="asset:shapes/base",
        family="sd15",
        method="lora",
        beta=beta,
        seed=seed,
        **TRAINING,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "anchor.json").write_text(json.dumps(asdict(card)))
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, folder / LORA_FILE)


class Colourful:
    """A scorer of any prompt: how far the channels of an image lie apart.

    Attributes:
        scored: the prompts of all that it scored.
        fail_after: after so many it is interrupted; None: never.
    """

    version = "1"
    scale = "levels"
    preprocessing = "none"

    def __init__(self, name="colourful", fail_after=None):
        self.name = name
        self.scored = []
        self.fail_after = fail_after

    def embed(self, images):
        """Unit vectors (N, 3) of images: the mean colour of each."""
        colours = [np.asarray(image.convert("RGB"), dtype=float).mean((0, 1)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.array(colours)), dim=-1)

    def __call__(self, images, prompts):
        if self.fail_after is not None and len(self.scored) >= self.fail_after:
            raise KeyboardInterrupt
        self.scored += prompts
        scores = []
        for image in images:
            values = np.asarray(image, dtype=float)
            scores.append(float(values.std(axis=2).mean()))
        return torch.tensor(scores)


def configured(root, samples, *scorers, judges=None, **settings):
    """The config of an evaluation, and its run directory.

    Args:
        root: the folder of all runs.
        samples: sample runs.
        scorers: labels of scorers without settings.
        judges: configs of scorers with settings, by label.
        settings: further keys.
    """
    labels = scorers or ("vivid",)
    config = EvalConfig(
        samples=samples,
        scorers={label: ScorerConfig() for label in labels} | (judges or {}),
        runs=str(root),
        tracking=TrackingConfig(kind="none"),
        **settings,
    )
    return config, root / "eval" / config.run_name()


def evaluate(root, samples, *scorers, draw=False, **settings):
    """The run directory of an evaluation. draw: with its figures, which take most of the time."""
    config, run_dir = configured(root, samples, *scorers, **settings)
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr("deradiff.evaluation.results.draw_figures", lambda *a: {})
        return run(config, run_dir).parent


def read(run_dir, table):
    """A table of an evaluation, as the csv holds it."""
    return pd.read_csv(run_dir / "tables" / f"{table}.csv")
