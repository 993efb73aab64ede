"""`python -m sample`: one anchor over a list of lambdas on common random numbers; the same command resumes, more lambdas extend."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.checks import section
from configs.entry import entry
from configs.tracking import tracker
from deradiff.files import slug
from deradiff.realignment.registry import MODES
from sample.config import SAMPLERS, SAMPLING_DEFAULTS, SHAPES, SampleConfig

if TYPE_CHECKING:
    from deradiff.anchors.anchor import Anchor
    from deradiff.data.prompts import Prompt
    from deradiff.models.family import Family

    Share = list[tuple[Prompt, int]]  # prompts and seeds, each for the lambdas that are missing

EXTENDS = (  # other values of these make more images, not other ones
    "lambdas",
    "targets",
    "prompts",
    "prompts_limit",
    "seeds",
    "batch_size",
    "batched",
    "path_kl",
    "bake",
    "runs",
    "name",
    "tracking",
    "model.name",
    "model.resolution",
)
TABLE_ROWS = 64  # prompts in the tracker's table of pictures


def run(config: SampleConfig, run_dir: Path) -> Path:
    """Sample each (prompt, seed, lambda) that is missing; returns the run directory with manifest.jsonl and grid.png.

    Under torchrun or accelerate launch the ranks share the prompts. Raises ValueError for a mistake in the config, before a weight loads.
    """
    from deradiff.data.prompts import load_prompts

    config, anchor = resolve(config)

    prompts = load_prompts(config.prompts, config.prompts_limit)

    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if config.bake:
        from sample.baking import bake_and_compare

        bake_and_compare(config, anchor, prompts, run_dir, state)
    else:
        sample_all(config, anchor, prompts, run_dir, state)
    state.destroy_process_group()
    return run_dir


def sample_all(
    config: SampleConfig, anchor: Anchor, prompts: list[Prompt], run_dir: Path, state: Any
) -> None:
    """What is missing of a resolved config's images, by all processes together, with the manifest, the grid and what is said."""
    from deradiff.files import anchor_digest, claim
    from sample.announce import announcement, cost
    from sample.manifest import image_path, intact, merge
    from sample.sampling import mode_options

    settings = (
        asdict(config)
        | mode_options(config)
        | {"anchor_sha256": anchor_digest(Path(anchor.root) / anchor.weights)}
    )
    if state.is_main_process:
        claim(run_dir, settings, EXTENDS)
        merge(run_dir)
        print(
            announcement(config, anchor, len(prompts), f"{state.num_processes} x {state.device}"),
            flush=True,
        )
    state.wait_for_everyone()
    done = intact(run_dir)
    state.wait_for_everyone()  # nobody writes before everybody has seen the same images, and so shares out the same rest
    rest = [
        (p, seed)
        for p in prompts
        for seed in config.seeds
        if any(image_path(lam, p.prompt_id, seed) not in done for lam in config.lambdas)
    ]
    with tracker(
        config.tracking,
        "sample",
        run_dir,
        settings,
        state.is_main_process,
        slug(str(config.model.base)),
    ) as track:
        if (
            Path(anchor.root).is_dir() and Path(anchor.root).name == "anchor"
        ):  # a training run's, which tracked it under this name
            track.uses(f"anchor-{Path(anchor.root).absolute().parent.name}", "model")
        count, seconds = _sample(
            config, anchor, rest[state.process_index :: state.num_processes], done, run_dir, state
        )
        state.wait_for_everyone()
        if state.is_main_process:
            records = merge(run_dir)
            _show(config, prompts, run_dir, track)
            track.artifact(f"samples-{run_dir.name}", "samples", run_dir / "manifest.jsonl")
            pace = (
                f"{count} images a process in {seconds:.1f} s, {seconds / count:.2f} s an image"
                if count
                else "every image was there"
            )
            print(
                "\n".join(
                    filter(
                        None, [cost(config, records), f"sample: {pace}; see {run_dir / 'grid.png'}"]
                    )
                ),
                flush=True,
            )
    state.wait_for_everyone()


def resolve(config: SampleConfig) -> tuple[SampleConfig, Anchor]:
    """The config with every null decided, and the anchor. Raises ValueError for what cannot work, and reads no weight to tell."""
    import torch

    from deradiff.anchors.anchor import check_anchor_family, load_anchor
    from deradiff.models.base_model import BaseModel, check_autoencoder
    from deradiff.models.families import FAMILIES

    anchor, model = load_anchor(config.anchor), config.model
    if model.name in FAMILIES:  # what `model=` says is known before the hub is asked for anything
        check_anchor_family(anchor, str(model.name))
    if model.base is None:
        if anchor.card is None:
            raise ValueError(
                f"{config.anchor} has no card to name its base: give model=sd15, model=sdxl or model.base=<pipeline folder or hub id>"
            )
        model = replace(
            model,
            base=anchor.card.base_model,
            revision=anchor.card.base_revision,
            vae=model.vae or anchor.card.vae,
        )
    if model.vae:
        with section("model"):
            check_autoencoder(model.vae)
    lambdas = sorted({*config.lambdas, *_lambdas_of(config, anchor)})
    base = str(model.base)
    family = BaseModel(base, model.revision).family
    check_anchor_family(anchor, family.name)
    shapes = base.startswith("asset:shapes/")
    prompts = config.prompts if config.prompts is not None else "shapes" if shapes else []
    defaults = SAMPLING_DEFAULTS[SHAPES if shapes else family.name]
    half = "bfloat16" if family.flow else "float16"
    config = replace(
        config,
        model=model,
        lambdas=lambdas,
        prompts=prompts,
        sampler=config.sampler or defaults.sampler,
        steps=config.steps or defaults.steps,
        batch_size=config.batch_size or max(1, defaults.batch_size // config.particles),
        guidance_scale=defaults.guidance_scale
        if config.guidance_scale is None
        else config.guidance_scale,
        height=config.height or model.resolution,
        width=config.width or model.resolution,
        dtype=config.dtype or (half if torch.cuda.is_available() else "float32"),
        path_kl=MODES[config.mode].measures_path_kl if config.path_kl is None else config.path_kl,
    )
    _check_fits(config, anchor, family)
    return config, anchor


def _check_fits(config: SampleConfig, anchor: Anchor, family: Family) -> None:
    """ValueError for options that this family, this base or this anchor does not have."""
    from sample.base_files import check_ddim

    if SAMPLERS[str(config.sampler)].flow != family.flow:
        fitting = ", ".join(
            name for name, sampler in SAMPLERS.items() if sampler.flow == family.flow
        )
        raise ValueError(
            f"sampler={config.sampler} is not for {family.name}: give one of {fitting}"
        )
    if config.sampler == "ddim":
        check_ddim(config)
    for key in ("height", "width"):
        if (side := getattr(config, key)) and side % family.multiple:
            raise ValueError(
                f"{key} must be a multiple of {family.multiple} pixels for {family.name}, not {side}"
            )
    if config.batched and anchor.method == "full":
        raise ValueError(
            f"batched=true evaluates a LoRA and its reference as one batch, and {config.anchor} is a full anchor: leave it away"
        )


def _lambdas_of(config: SampleConfig, anchor: Anchor) -> list[float]:
    """lambda = beta / target, for each target."""
    if not config.targets:
        return []
    if anchor.card is None or anchor.card.beta is None:
        raise ValueError(
            f"the beta of {config.anchor} is not known, so targets cannot be turned into lambdas: give lambdas=[...] instead"
        )
    return [anchor.card.beta / target for target in config.targets]


def _sample(
    config: SampleConfig, anchor: Anchor, share: Share, done: set[str], run_dir: Path, state: Any
) -> tuple[int, float]:
    """Sample this process's share. Returns how many images it made, and in how many seconds, loading aside."""
    if not share:
        return 0, 0.0
    from tqdm import tqdm

    from deradiff.realignment.dial import BeyondAnchorWarning
    from deradiff.realignment.resampling import GuidedParticlesWarning
    from sample.manifest import image_path, save_image
    from sample.sampling import load_sampler, sample_images

    count = sum(
        image_path(lam, prompt.prompt_id, seed) not in done
        for prompt, seed in share
        for lam in config.lambdas
    )

    pipe = load_sampler(config, state.device)
    start = time.monotonic()
    with (
        warnings.catch_warnings(),
        tqdm(total=count, unit=" images", desc="sample", disable=not state.is_main_process) as bar,
    ):
        # The stage has announced both before its progress bar.
        warnings.simplefilter("ignore", BeyondAnchorWarning)
        warnings.simplefilter("ignore", GuidedParticlesWarning)
        for png, record in sample_images(pipe, config, anchor, share, done):
            save_image(run_dir, state.process_index, png, record)
            bar.update()
    return count, time.monotonic() - start


def _show(config: SampleConfig, prompts: list[Prompt], run_dir: Path, track: Any) -> None:
    """grid.png, and for the tracker the same as a table: prompts down, lambdas across, at the first seed."""
    from sample.grid import ROWS, draw_grid
    from sample.manifest import image_path

    rows = [
        (
            p.text,
            [run_dir / image_path(lam, p.prompt_id, config.seeds[0]) for lam in config.lambdas],
        )
        for p in prompts[:TABLE_ROWS]
    ]
    spread = rows[:: math.ceil(len(rows) / ROWS)]  # neighbours in a list of prompts are often alike
    draw_grid(spread, config.lambdas, run_dir / "grid.png")
    track.image("grid", run_dir / "grid.png")
    track.table(
        "samples",
        ["prompt", *(f"lam={lam:g}" for lam in config.lambdas)],
        [[text, *images] for text, images in rows],
    )


main = entry("sample", SampleConfig, run)
