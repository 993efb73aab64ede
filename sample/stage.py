"""`python -m sample`: one anchor over a list of lambdas on common random numbers; the same command resumes, more lambdas extend."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.entry import entry
from configs.tracking import tracker
from sample.config import DEFAULTS, SampleConfig

if TYPE_CHECKING:
    from deradiff.anchors import Anchor
    from deradiff.data.prompts import Prompt

    Share = list[tuple[Prompt, int]]  # prompts and seeds, each for the lambdas that are missing

EXTENDS = (  # other values of these make more images, not other ones
    "lambdas", "targets", "prompts", "seeds", "batch_size", "path_kl", "runs", "name", "tracking", "model.name", "model.resolution",
)  # fmt: skip
TABLE_ROWS = 64  # prompts in the tracker's table of pictures


def run(config: SampleConfig, run_dir: Path) -> Path:
    """Sample each (prompt, seed, lambda) that is missing; returns the run directory with manifest.jsonl and grid.png.

    Under torchrun or accelerate launch the ranks share the prompts. Raises ValueError for a mistake in the config, before a weight loads.
    """
    config, anchor = resolve(config)
    from deradiff.data.prompts import load_prompts

    prompts = load_prompts(config.prompts)

    import torch
    from accelerate import PartialState

    from deradiff.runs import claim
    from sample.manifest import image_path, intact, merge

    state = PartialState(cpu=not torch.cuda.is_available())
    settings = asdict(config) | {"anchor_sha256": _weights_digest(Path(config.anchor))}
    if state.is_main_process:
        claim(run_dir, settings, EXTENDS)
        merge(run_dir)
        print(_announcement(config, anchor, len(prompts), f"{state.num_processes} x {state.device}"), flush=True)
    state.wait_for_everyone()
    done = intact(run_dir)
    state.wait_for_everyone()  # nobody writes before everybody has seen the same images, and so shares out the same rest
    rest = [
        (p, seed) for p in prompts for seed in config.seeds if any(image_path(lam, p.prompt_id, seed) not in done for lam in config.lambdas)
    ]
    with tracker(config.tracking, "sample", run_dir, settings, state.is_main_process) as track:
        count, seconds = _sample(config, anchor, rest[state.process_index :: state.num_processes], done, run_dir, state)
        state.wait_for_everyone()
        if state.is_main_process:
            merge(run_dir)
            _show(config, prompts, run_dir, track)
            pace = f"{count} images a process in {seconds:.1f} s, {seconds / count:.2f} s an image" if count else "every image was there"
            print(f"sample: {pace}; see {run_dir / 'grid.png'}", flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return run_dir


def resolve(config: SampleConfig) -> tuple[SampleConfig, Anchor]:
    """The config with every null decided, and the anchor. Raises ValueError for what cannot work, and reads no weight to tell."""
    import torch

    from deradiff.anchors import check_anchor_family, load_anchor
    from deradiff.families import check_autoencoder, checkpoint_family

    anchor, model = load_anchor(config.anchor), config.model
    if model.base is None:
        if anchor.card is None:
            raise ValueError(
                f"{config.anchor} has no card to name its base: give model=sd15, model=sdxl or model.base=<pipeline folder or hub id>"
            )
        model = replace(model, base=anchor.card.base_model, revision=anchor.card.base_revision, vae=model.vae or anchor.card.vae)
    if model.vae:
        check_autoencoder(model.vae)
    lambdas = sorted({*config.lambdas, *_lambdas_of(config, anchor)})
    base = str(model.base)
    family = checkpoint_family(base, model.revision).name
    check_anchor_family(anchor, family)
    shapes = base.startswith("asset:shapes/")
    prompts = config.prompts if config.prompts is not None else "shapes" if shapes else []
    defaults = DEFAULTS["shapes" if shapes else family]
    return replace(
        config, model=model, lambdas=lambdas, prompts=prompts,
        steps=config.steps or defaults.steps, batch_size=config.batch_size or defaults.batch_size,
        guidance_scale=defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        height=config.height or model.resolution, width=config.width or model.resolution,
        dtype=config.dtype or ("float16" if torch.cuda.is_available() else "float32"),
    ), anchor  # fmt: skip


def _lambdas_of(config: SampleConfig, anchor: Anchor) -> list[float]:
    """lambda = beta / target, for each target."""
    if not config.targets:
        return []
    if anchor.card is None or anchor.card.beta is None:
        raise ValueError(f"the beta of {config.anchor} is not known, so targets cannot be turned into lambdas: give lambdas=[...] instead")
    return [anchor.card.beta / target for target in config.targets]


def _sample(config: SampleConfig, anchor: Anchor, share: Share, done: set[str], run_dir: Path, state: Any) -> tuple[int, float]:
    """Sample this process's share. Returns how many images it made, and in how many seconds, loading aside."""
    if not share:
        return 0, 0.0
    from tqdm import tqdm

    from sample.manifest import image_path, save_image
    from sample.sampling import load_sampler, sample_images

    count = sum(image_path(lam, prompt.prompt_id, seed) not in done for prompt, seed in share for lam in config.lambdas)

    pipe = load_sampler(config, state.device)
    start = time.monotonic()
    with tqdm(total=count, unit="image", desc="sample", disable=not state.is_main_process) as bar:
        for png, record in sample_images(pipe, config, anchor, share, done):
            save_image(run_dir, state.process_index, png, record)
            bar.update()
    return count, time.monotonic() - start


def _show(config: SampleConfig, prompts: list[Prompt], run_dir: Path, track: Any) -> None:
    """grid.png, and for the tracker the same as a table: prompts down, lambdas across, at the first seed."""
    from sample.grid import ROWS, draw_grid
    from sample.manifest import image_path

    rows = [(p.text, [run_dir / image_path(lam, p.prompt_id, config.seeds[0]) for lam in config.lambdas]) for p in prompts[:TABLE_ROWS]]
    spread = rows[:: math.ceil(len(rows) / ROWS)]  # neighbours in a list of prompts are often alike
    draw_grid(spread, config.lambdas, run_dir / "grid.png")
    track.image("grid", run_dir / "grid.png")
    track.table("samples", ["prompt", *(f"lam={lam:g}" for lam in config.lambdas)], [[text, *images] for text, images in rows])


def _announcement(config: SampleConfig, anchor: Anchor, prompts: int, device: str) -> str:
    beta = anchor.card.beta if anchor.card else None
    strength = f"beta {beta:g}" if beta else "beta unknown"
    lines = [
        f"sample: {config.anchor} ({strength}) against {config.model.base}, mode {config.mode}, {config.sampler}, {config.steps} steps, "
        f"guidance {config.guidance_scale:g}, {config.dtype} on {device}",
        f"sample: {prompts} prompts x {len(config.seeds)} seeds x {len(config.lambdas)} lambdas",
    ]
    for lam in config.lambdas:
        target = "the reference" if lam == 0 else f"beta_target {beta / lam:g}" if beta else "beta_target unknown"
        lines.append(f"  lam {lam:<6g} {target}" + ("  (the anchor)" if lam == 1 else ""))
    return "\n".join(lines)


def _weights_digest(anchor: Path) -> str | None:
    """Of a local anchor's weights, so that the images of one that was trained anew are not taken for its own; None for a hub id.

    The header is digested in sorted order: safetensors writes its metadata in a random one, and saving the same anchor again is no change.
    """
    files = sorted(anchor.rglob("*.safetensors")) if anchor.is_dir() else [anchor] if anchor.is_file() else []
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            digest.update(json.dumps(header, sort_keys=True).encode())
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


main = entry("sample", SampleConfig, run)
