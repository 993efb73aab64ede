"""`python -m train`: one run of one objective, resumed by the same command."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from configs.entry import entry
from configs.tracking import tracker
from train.config import TrainConfig

COSMETIC = (  # what a resumed run may change
    "runs",
    "name",
    "tracking",
    "panel",
    "hub",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "cpu",
    "data.workers",
    "data.max_broken",
    "dpo.reference_errors",
)


def run(config: TrainConfig, run_dir: Path) -> Path:
    """Train, save and describe; returns the folder of what was trained (`anchor/`, `pipeline/`, `clip/` or `vae/`)."""
    from train import build, card, results

    family = build.check(config, run_dir)
    if config.data.dry_run:
        from train.dry_run import dry_run

        return dry_run(config)

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from deradiff.data.pairs import Examples
    from deradiff.files import claim, slug
    from deradiff.training.loop import train
    from train.data import make_data

    optim = config.optim
    patience = InitProcessGroupKwargs(
        timeout=timedelta(hours=24)
    )  # ranks wait while one labels pairs or writes the last of a cache
    accelerator = Accelerator(
        cpu=config.cpu,
        mixed_precision=config.precision,
        gradient_accumulation_steps=optim.accumulation,
        kwargs_handlers=[patience],
    )
    per_step = optim.batch_size * optim.accumulation * accelerator.num_processes
    options = _options(config, per_step)
    data = make_data(config, accelerator)
    if (
        accelerator.is_main_process
    ):  # other ranks than these would change the order of the data, and are another run
        claim(run_dir, asdict(config) | {"pairs_per_step": per_step}, COSMETIC)
    if folder := results.finished(run_dir):
        accelerator.print(
            f"train: {run_dir} is finished: see {folder}; another name=... or seed=... starts another run"
        )
        if accelerator.is_main_process:
            results.upload(config, folder)
        accelerator.end_training()
        return folder
    about = (
        card.make_card(config, family, per_step, _device(accelerator))
        if family and config.objective == "dpo"
        else None
    )
    objective: Any = build.make_objective(config, data, accelerator, about)
    accelerator.print(
        f"train: {run_dir}: {config.steps} steps of {per_step} examples, learning rate {options.learning_rate:.4g}"
    )
    if about:
        options.flops_per_step = card.flops_per_step(objective, config, per_step, recomputed=False)
        strength = card.kl_strength_of(objective, config)
        accelerator.print(
            f"train: beta {config.dpo.beta:g} ({about.beta_convention}), a KL strength of {strength:.2g}"
        )
    group = slug(config.model.base or config.model.name)
    with tracker(
        config.tracking, "train", run_dir, asdict(config), accelerator.is_main_process, group
    ) as track:
        examples = Examples(data, config.seed, in_blocks=not config.data.cache)
        panels = results.Panels(config, run_dir, about, data.captions, track, accelerator.device)
        progress = train(objective, examples, options, run_dir, accelerator, track.log, panels)
        folder = run_dir
        if accelerator.is_main_process:
            if about:
                gpu_hours = progress.seconds / 3600 * accelerator.num_processes
                flops = config.steps * card.flops_per_step(
                    objective, config, per_step, recomputed=True
                )
                objective.card = replace(about, gpu_hours=gpu_hours, flops=flops)
                if config.panel.every:
                    panels(objective.network, config.steps)
            folder = results.finish(
                objective,
                config,
                run_dir,
                track,
                card.recipe(config, per_step, options.learning_rate),
            )
            print(
                f"train: {folder} ({progress.step} steps, {progress.seconds:.0f} s of training)",
                flush=True,
            )
            results.upload(config, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _options(config: TrainConfig, per_step: int) -> Any:
    from deradiff.training.dpo import learning_rate
    from deradiff.training.optimizers import TrainingOptions

    optim = config.optim
    rule = optim.rule if config.objective == "dpo" else "fixed"
    rate = learning_rate(optim.lr, rule, config.dpo.beta, per_step if optim.per_pair else 1)
    return TrainingOptions(
        steps=config.steps,
        batch_size=optim.batch_size,
        accumulation=optim.accumulation,
        learning_rate=rate,
        warmup=optim.warmup,
        decay=optim.decay,
        optimizer=optim.name,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        ema=optim.ema,
        seed=config.seed,
        workers=config.data.workers,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        show_every=config.panel.every if config.objective == "dpo" else 0,
    )


def _device(accelerator: Any) -> str:
    import platform

    import torch

    name = (
        torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"cpu ({platform.machine()})"
    )
    return f"{accelerator.num_processes} x {name}"


main = entry("train", TrainConfig, run)
