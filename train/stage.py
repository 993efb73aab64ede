"""`python -m train`: one run of one objective, resumed by the same command."""

from __future__ import annotations

import platform
import shlex
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from configs.tracking import tracker
from deradiff.command_line import command_of
from deradiff.data.pairs import CaptionedImages, Examples
from deradiff.files import slug
from deradiff.locks import run_lock
from deradiff.models.base_model import BaseModel
from deradiff.run_directories import claim
from deradiff.terminal import say
from deradiff.training import zero
from deradiff.training.checkpoints import Checkpoints
from deradiff.training.dpo import learning_rate
from deradiff.training.loop import train
from deradiff.training.objectives.base import AnchorObjective, Objective
from deradiff.training.options import TrainingOptions
from deradiff.training.ranks import COLLECTIVE_PATIENCE, Ranks, Watch, gather_ranks
from deradiff.training.same_run import check_same, flattened, network_checksum
from train import build, results
from train.batch_size import check_auto, choose_batch_size, with_batch_size
from train.config import AUTO, TrainConfig
from train.data import make_data
from train.dry_run import dry_run
from train.panels import Panels

COSMETIC = (  # keys that a resumed run may change
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
    "ranks_timeout",
    "data.workers",
    "data.max_broken",
    "dpo.reference_errors",
)
OF_A_MACHINE = (  # keys that ranks on other machines may have other values of
    "runs",
    "tracking",
    "hub",
    "panel",
    "cpu",
    "data.path",
    "data.workers",
    "model.base",
    "model.clip",
    "model.vae",
)


def run(config: TrainConfig, run_dir: Path) -> Path:
    """Train, save and describe; or go on, where the same command was stopped.

    Returns:
        The folder of what was trained: `anchor/`, `pipeline/`, `clip/` or `vae/`.
    """
    # Everything that can be refused is refused before a weight is loaded.
    base = build.base_model(config)
    build.check(config, base, run_dir)
    if config.data.dry_run:
        return dry_run(config, base)
    with Watch(_gather_ranks(config), "train", partial(_last_checkpoint, run_dir)):
        accelerator = _accelerator(config)
        check_same(_start(config), accelerator)
        config.optim.shares(accelerator.num_processes)
        check_auto(config, accelerator)
        data = make_data(config, base, accelerator)
        check_same({"the digest of the data's rows": data.rows_digest}, accelerator)
        with run_lock(run_dir, accelerator.is_main_process):
            return _run_alone(config, base, data, run_dir, accelerator)


def _run_alone(
    config: TrainConfig,
    base: BaseModel | None,
    data: CaptionedImages,
    run_dir: Path,
    accelerator: Accelerator,
) -> Path:
    """Train in a run directory that is ours, or say that the run is finished."""
    # The run directory is this config's, on any number of ranks.
    if accelerator.is_main_process:
        claim(run_dir, asdict(config), _changeable(config))

    # A finished run is only uploaded, where that has not happened yet. Rank 0 has the results, on a
    # disk that others may not see.
    (folder,) = broadcast_object_list([results.finished_folder(config, run_dir)])
    if folder is not None:
        say(
            f"train: {run_dir} is finished: see {folder}{_next_command(config, folder)}; another "
            "name=... or seed=... starts another run",
            is_main=accelerator.is_main_process,
        )
        if accelerator.is_main_process:
            results.upload(config, folder)
        accelerator.end_training()
        return folder

    folder = _train(config, base, data, run_dir, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _train(
    config: TrainConfig,
    base: BaseModel | None,
    data: CaptionedImages,
    run_dir: Path,
    accelerator: Accelerator,
) -> Path:
    """Train the objective of a run, and leave its results; returns their folder."""
    # The objective, with its networks.
    card = None
    if config.spec.makes_anchor and base is not None:
        card = results.make_card(config, base, _device_name(accelerator))
    objective = build.make_objective(build.RunParts(config, base, data, accelerator, card))
    _check_weights(objective, accelerator)
    anchor = cast(AnchorObjective, objective) if card is not None else None

    # How it is trained.
    examples = Examples(data, config.seed, in_blocks=not config.data.cache)
    if config.optim.batch_size == AUTO and base is not None:
        size = choose_batch_size(config, base, objective, examples, run_dir, accelerator)
        config = with_batch_size(config, size)
    per_step = config.optim.pairs_per_step
    shares = config.optim.shares(accelerator.num_processes)
    options = _options(config)
    say(
        f"train: {run_dir}: {config.steps} steps of {per_step} examples ({shares}), "
        f"learning rate {options.learning_rate:.4g}",
        is_main=accelerator.is_main_process,
    )
    if anchor is not None:
        options.flops_per_step = anchor.step_flops(per_step, checkpointing=False)
        if config.beta is not None:
            say(
                f"train: beta {config.beta:g} ({anchor.card.beta_convention}), a KL strength of "
                f"{anchor.kl_strength():.2g}",
                is_main=accelerator.is_main_process,
            )

    # Training, with panels on the way.
    is_main = accelerator.is_main_process
    group = slug(config.model.base or config.model.name)
    with tracker(config.tracking, "train", run_dir, asdict(config), is_main, group) as track:
        panels = Panels(config, base, run_dir, card, data.captions, track, accelerator.device)
        if anchor is not None and is_main:
            step_flops = results.flops_of_step(anchor, config, run_dir)
        progress = train(objective, examples, options, run_dir, accelerator, track.log, panels)
        if not is_main:
            return run_dir

        # The main process saves the results; an anchor's card then knows what they have cost.
        if anchor is not None:
            results.add_cost(anchor, config, step_flops, progress)
            if config.panel.every:
                panels(anchor.network, config.steps)
        summary = results.training_summary(config, options.learning_rate)
        folder = results.finish(objective, config, run_dir, track, summary)
        cost = f"{progress.step} steps, {progress.seconds:.0f} s of training"
        say(f"train: {folder} ({cost}){_next_command(config, folder)}")
        results.upload(config, folder)
    return folder


def _next_command(config: TrainConfig, folder: Path) -> str:
    """What to type next, after an anchor; empty after what is none."""
    if not config.spec.makes_anchor:
        return ""
    return f"; next: {command_of('sample')} {shlex.quote(f'anchor={folder}')}"


def _start(config: TrainConfig) -> dict[str, Any]:
    """What all ranks have to start with: the config, the code and the packages."""
    facts: dict[str, Any] = {}
    for key, value in flattened(asdict(config)).items():
        names = (key, key.partition(".")[0])
        if not any(name in OF_A_MACHINE for name in names):
            facts[key] = value
    facts["the commit of deradiff"] = results.git_commit()
    for name, version in results.versions().items():
        facts[f"the version of {name}"] = version
    return facts


def _check_weights(objective: Objective, accelerator: Accelerator) -> None:
    """Raise ValueError where ranks have loaded different networks; collective."""
    if accelerator.num_processes == 1:
        return
    facts = {"the checksum of the network": network_checksum(objective.network)}
    for number, network in enumerate(objective.frozen, start=1):
        name = f"the checksum of frozen network {number} ({type(network).__name__})"
        facts[name] = network_checksum(network)
    check_same(facts, accelerator)


def _changeable(config: TrainConfig) -> tuple[str, ...]:
    """The keys that a resumed run may change."""
    return COSMETIC if config.spec.compares_batch else (*COSMETIC, "optim.batch_size")


def _on_cpu(config: TrainConfig) -> bool:
    """Whether a run computes on the CPU: it is told so, or there is nothing else."""
    return config.cpu or not torch.accelerator.is_available()


def _gather_ranks(config: TrainConfig) -> Ranks:
    """All ranks of the launch; DeepSpeed makes its group itself."""
    if zero.asked_for():
        return Ranks(None, 0, 1, config.ranks_timeout)
    device = "cpu" if _on_cpu(config) else str(torch.accelerator.current_accelerator())
    return gather_ranks(device, config.ranks_timeout)


def _last_checkpoint(run_dir: Path) -> str:
    """What a run can go on from, in a few words."""
    newest = Checkpoints(run_dir, keep_last=1).newest()
    return "there is no checkpoint yet" if newest is None else f"{newest} is the last checkpoint"


def _accelerator(config: TrainConfig) -> Accelerator:
    # Without an accelerator several processes form a group only where they are told so.
    on_cpu = _on_cpu(config)
    deepspeed = zero.asked_for()
    group = InitProcessGroupKwargs(timeout=COLLECTIVE_PATIENCE)
    if on_cpu and deepspeed:
        group.backend = "gloo"

    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        mixed_precision=config.precision,
        kwargs_handlers=[group],
    )
    if deepspeed:
        zero.load_networks_whole()
        zero.check_config(accelerator.deepspeed_plugin.deepspeed_config)
        other = accelerator.mixed_precision
        if other != config.precision:
            raise ValueError(
                f"precision={config.precision}, and DeepSpeed's own config file says {other}: give "
                f"precision={other}, or remove it from that file"
            )
    return accelerator


def _options(config: TrainConfig) -> TrainingOptions:
    """The options of the loop; the learning rate is scaled by beta where there is one."""
    # The rate of a step, from the rate of a pair where the config gives that.
    optim = config.optim
    pairs = optim.pairs_per_step if optim.per_pair else 1
    if config.beta is None:
        rate = optim.lr * pairs
    else:
        rate = learning_rate(optim.lr, optim.rule, config.beta, pairs)

    return TrainingOptions(
        steps=config.steps,
        pairs_per_step=optim.pairs_per_step,
        batch_size=optim.batch_size,
        learning_rate=rate,
        warmup=optim.warmup,
        decay=optim.decay,
        optimizer=optim.name,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        ema=optim.ema,
        workers=config.data.workers,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        show_every=config.panel.every if config.spec.makes_anchor else 0,
        cuda_graphs=config.model.compile,
    )


def _device_name(accelerator: Accelerator) -> str:
    """Number and name of the devices, as the card has them."""
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu ({platform.machine()})"
    return f"{accelerator.num_processes} x {name}"
