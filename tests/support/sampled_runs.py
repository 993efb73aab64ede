"""Sample runs as the sample stage leaves them, drawn and not sampled: how vivid a picture is
follows from how strongly it is aligned. And what the tests of the eval stage share: a counting
scorer, and calls of the stage.
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


def picture(caption: str, seed: int, strength: float) -> bytes:
    """A 32-pixel disc, more saturated the larger `strength` (1000 lam / beta) is; where it lies
    depends on caption and seed alone."""
    scene, rng = scene_of(caption), np.random.default_rng([seed, zlib.crc32(caption.encode())])
    x, y = np.meshgrid(np.arange(32) - 15.5, np.arange(32) - 15.5)
    cover = np.clip(10.5 - np.hypot(x - rng.normal(), y - rng.normal()), 0, 1)[..., None]
    saturation = 0.35 + 0.2 * rng.uniform() + 0.45 * (1 - np.exp(-strength))
    colour = rgb_of_hsv(np.array([HUES[scene.colour]]), np.array([saturation]), np.array([0.9]))
    pixels = cover * colour + (1 - cover) * np.array(BACKGROUNDS[scene.background])
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).astype(np.uint8)).save(buffer, format="PNG")
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
    **overrides: object,
) -> str:
    """A sample run below `root` with its anchor's card; its path.

    bias: added to the strength of realigned images (lam other than 0, 1). shift: added to that of
        the anchor itself, as a training seed may. overrides: of the manifest's values.
    """
    name = f"shapes-beta{beta:g}-seed{training_seed}"
    anchor, run = root / "train" / name / "anchor", root / "sample" / f"{name}-{mode}"
    cost = {"steps": 200, "pairs_seen": 3200, "gpu_hours": 0.02, "device": "cpu", "flops": 2e13}
    card = AnchorCard(
        base_model="asset:shapes/base",
        family="sd15",
        method="lora",
        beta=beta,
        seed=training_seed,
        **cost,
    )
    anchor.mkdir(parents=True, exist_ok=True)
    (anchor / "anchor.json").write_text(json.dumps(asdict(card)))
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, anchor / LORA_FILE)
    lines = []
    for index, caption in enumerate(held_out_captions()[:prompts]):
        for seed, lam in itertools.product(range(seeds), lambdas):
            strength = 1000 * lam / beta + (shift if lam == 1 else bias if lam else 0)
            png, image = picture(caption, seed, strength), f"lam={lam:.2f}/p{index}-s{seed}.png"
            (run / image).parent.mkdir(parents=True, exist_ok=True)
            (run / image).write_bytes(png)
            what = {
                "image": image,
                "sha256": hashlib.sha256(png).hexdigest(),
                "prompt_id": f"p{index}",
                "prompt": caption,
                "seed": seed,
            }
            who = {
                "anchor": str(anchor),
                "beta": beta,
                "lam": lam,
                "beta_target": beta / lam if lam else None,
                "mode": mode,
            }
            how = {
                "sampler": "ddim",
                "steps": 20,
                "guidance_scale": 2.5,
                "height": 32,
                "width": 32,
                "generator_seed": 100 * index + seed,
            }
            lines.append(
                json.dumps(
                    what | who | how | {"path_kl": 40 * lam**2 * 1000 / beta} | overrides,
                    ensure_ascii=False,
                )
            )
    (run / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return str(run)


class Colourful:
    """A scorer of any prompt: how far the channels of a picture lie apart. Counts what it
    scores."""

    version, scale, preprocessing = "1", "levels", "none"

    def __init__(self, name="colourful", fail_after=None):
        self.name, self.scored, self.fail_after = name, [], fail_after

    def __call__(self, images, prompts):
        if self.fail_after is not None and len(self.scored) >= self.fail_after:
            raise KeyboardInterrupt
        self.scored += prompts
        return torch.tensor(
            [float(np.asarray(image, dtype=float).std(axis=2).mean()) for image in images]
        )


def counting(monkeypatch):
    """Puts one counting scorer in the place of every scorer, and returns it."""
    scorer = Colourful()
    monkeypatch.setattr("eval.stage.check_spec", lambda spec: None)
    monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda spec, device: scorer)
    return scorer


def configured(root, samples, *scorers, **settings):
    chosen = {name: ScorerConfig() for name in scorers or ("vivid",)}
    config = EvalConfig(
        samples=samples,
        scorers=chosen,
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
    return pd.read_csv(run_dir / "tables" / f"{table}.csv")
