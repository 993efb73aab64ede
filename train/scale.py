"""Hours, memory, disk and cost of a training by card and by number of GPUs, on paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from deradiff.models.base_model import BaseModel
from deradiff.models.gpus import GPUS, MEASURED_MFU, MEASURED_MFU_OF_GRAPHS
from deradiff.models.published import DATA_SETS, PUBLISHED_MODELS, PublishedModel
from deradiff.models.requirements import SINGLE
from deradiff.terminal import say
from train.build import base_model
from train.config import TrainConfig
from train.data import encodings_need, errors_need, in_units, open_data
from train.estimate import Estimate, estimate
from train.needs_config import NeedsConfig

COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs."""

BETWEEN = " | "


def run(config: NeedsConfig, run_dir: Path) -> None:
    """Print what the training needs. Nothing is written, and no weight is read.

    Args:
        config: of the training, and the machines.
        run_dir: of the training, which is not touched.

    Raises:
        ValueError: for an objective other than Diffusion-DPO.
    """
    if not config.spec.has_reference:
        raise ValueError(f"needs counts objective=dpo, and not objective={config.objective}")

    # The recipe, counted on the networks' configs.
    base = described_base(config)
    rows, captions = row_counts(config)
    say("needs: counting on the networks' configs, which takes seconds")
    found = estimate(config, base, rows)
    optim = config.optim
    say(
        f"needs: {config.model.name} {config.finetune.method} at {config.model.resolution} px in "
        f"{config.precision}, {optim.name}, {config.steps} steps of {optim.pairs_per_step} pairs, "
        f"{optim.batch_size} at once: {found.steps.useful / 1e18:.1f} EFLOP",
        "",
    )

    # Memory and disk, then hours and costs.
    say(*memory_table(config, found), *remedies(config, base, found, rows))
    encodings = encodings_need(config, base, 2 * rows, captions)
    say(
        "",
        f"Disk: {in_units(encodings)} of latents and text embeddings ({rows:,} pairs, "
        f"{captions:,} captions), {in_units(errors_need(config))} of reference errors, "
        f"{in_units(found.checkpoints)} of checkpoints.",
        "",
    )
    say(*hours_table(config, found), "", *notes(config, found))


def described_base(config: TrainConfig) -> BaseModel | PublishedModel:
    """The base model; of a published one the sizes are known without the hub."""
    known = PUBLISHED_MODELS.get(str(config.model.base))
    if known is not None:
        return PublishedModel(known)
    base = base_model(config)
    assert base is not None  # Diffusion-DPO has one
    return base


def row_counts(config: TrainConfig) -> tuple[int, int]:
    """Pairs and distinct captions; those of a published data set are known without the hub."""
    data = config.data
    if data.source != "table":
        return data.count, data.count
    known = DATA_SETS.get(str(data.path).rpartition("/")[2])
    if known is not None:
        rows = min(known.rows, data.limit or known.rows)
        return rows, min(rows, known.captions or rows)
    table = open_data(config, str(data.path), data.split, data.revision, data.streaming)
    return len(table), len(set(table.captions))


# Memory


def phases(found: Estimate) -> dict[str, float]:
    """Bytes of one device by phase."""
    phases = {
        "a step": found.training,
        "building the cache": found.caching,
        "a panel": found.panel,
    }
    return {name: size for name, size in phases.items() if size}


def memory_table(config: NeedsConfig, found: Estimate) -> list[str]:
    """The memory of each phase, and whether each card has it."""
    lines = _head(["memory of one GPU", "GB", *config.needs.cards])
    for phase, size in phases(found).items():
        fits = ["fits" if size < GPUS[card].memory else "too large" for card in config.needs.cards]
        lines.append(_row([phase, f"{size / 1e9:.1f}", *fits]))
    return lines


@dataclass(frozen=True)
class Remedy:
    """A setting that takes less memory.

    Attributes:
        setting: as it is typed.
        is_set: whether a config has it.
        apply: the config with it.
    """

    setting: str
    is_set: Callable[[TrainConfig], bool]
    apply: Callable[[TrainConfig], TrainConfig]


def _with_checkpointing(config: TrainConfig) -> TrainConfig:
    return replace(config, model=replace(config.model, gradient_checkpointing=True))


def _with_one_pair(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, batch_size=1))


def _without_panels(config: TrainConfig) -> TrainConfig:
    return replace(config, panel=replace(config.panel, every=0))


def _with_small_moments(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=replace(config.optim, name="adamw8bit_torchao"))


REMEDIES = (
    Remedy(
        "model.gradient_checkpointing=true",
        lambda config: config.model.gradient_checkpointing,
        _with_checkpointing,
    ),
    Remedy("optim.batch_size=1", lambda config: config.optim.batch_size == 1, _with_one_pair),
    Remedy("panel.every=0", lambda config: config.panel.every == 0, _without_panels),
    Remedy(
        "optim.name=adamw8bit_torchao",
        lambda config: config.optim.name != "adamw" or config.finetune.method == "lora",
        _with_small_moments,
    ),
)
"""In the order in which they are tried; the first ones change no result."""


def remedies(
    config: NeedsConfig, base: BaseModel | PublishedModel, found: Estimate, rows: int
) -> list[str]:
    """What to set for the cards that are too small, one line a card."""
    small = [card for card in config.needs.cards if found.memory >= GPUS[card].memory]
    small.sort(key=lambda card: -GPUS[card].memory)
    lines: list[str] = []
    settings: list[str] = []
    changed: TrainConfig = config
    left = list(REMEDIES)
    for card in small:
        # Settings are added until it fits; what a larger card needs, a smaller one needs too.
        while found.memory >= GPUS[card].memory and left:
            remedy = left.pop(0)
            if not remedy.is_set(changed):
                changed = remedy.apply(changed)
                settings.append(remedy.setting)
                found = estimate(changed, base, rows)
        size = in_units(found.memory)
        if found.memory < GPUS[card].memory:
            lines.append(f"{card}: set {' '.join(settings)}, for {size}")
        else:
            lines.append(
                f"{card}: no setting makes it fit ({size} at the least): take finetune=lora, a "
                "smaller model.resolution, or shard it with FSDP2 (docs/clusters.md)"
            )
    return ["", *lines] if lines else []


# Hours


@dataclass(frozen=True)
class Pace:
    """How long a step takes on paper.

    Attributes:
        arithmetic: seconds of one GPU for the whole step.
        message: seconds in which the gradients pass the slowest link once.
    """

    arithmetic: float
    message: float

    def network(self, count: int) -> float:
        """Seconds that a ring of so many GPUs takes to sum the gradients."""
        return 2 * (count - 1) / count * self.message

    def step(self, count: int) -> float:
        """Seconds of a step on so many GPUs, nothing of it at the same time."""
        return self.arithmetic / count + self.network(count)

    @property
    def limit(self) -> int:
        """From how many GPUs on the network takes longer than the arithmetic."""
        return int(self.arithmetic / (2 * self.message)) + 2


def pace(config: NeedsConfig, found: Estimate, card: str) -> Pace:
    """The pace of a recipe on a card."""
    flops = found.steps.useful / config.steps
    bytes_of_gradients = SINGLE * found.steps.trained
    return Pace(
        flops / (GPUS[card].tflops * 1e12 * mfu_of(config)),
        bytes_of_gradients / (config.needs.bandwidth * 1e9),
    )


def mfu_of(config: NeedsConfig) -> float:
    """The share of the peak that is assumed."""
    if config.needs.mfu:
        return config.needs.mfu
    method = config.finetune.method
    if config.model.compile and method in MEASURED_MFU_OF_GRAPHS:
        return MEASURED_MFU_OF_GRAPHS[method]
    return MEASURED_MFU[method]


def hours_table(config: NeedsConfig, found: Estimate) -> list[str]:
    """Hours, and costs where there are prices, by number of GPUs."""
    # A column for each card, and another one for its cost.
    cards = config.needs.cards
    prices = dict(zip(cards, config.needs.prices, strict=False))
    head = ["GPUs", "accumulation"]
    for card in cards:
        head.append(f"h, {card}")
        if prices:
            head.append(f"$, {card}")
    lines = _head([*head, "network, s a step"])

    # A row for each number of GPUs that can share a step.
    for count in COUNTS:
        try:
            accumulation = config.optim.shares(count).accumulation
        except ValueError:
            continue
        cells = [str(count), str(accumulation)]
        for card in cards:
            hours = config.steps * pace(config, found, card).step(count) / 3600
            cells.append(f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}")
            if prices:
                cells.append(f"{hours * count * prices[card]:,.0f}")
        seconds = pace(config, found, cards[0]).network(count)
        lines.append(_row([*cells, f"{seconds:.2g}"]))
    return lines


def notes(config: NeedsConfig, found: Estimate) -> list[str]:
    """What the numbers assume, and where the network would be the limit."""
    needs = config.needs
    if needs.mfu:
        source = "as given"
    else:
        source = (
            "measured on one H200 with SDXL at 1024 px, 4 pairs at once, and assumed for all cards "
            "(needs.mfu=)"
        )
    gradients = in_units(SINGLE * found.steps.trained)
    lines = [
        f"Hours: {mfu_of(config):.0%} of the 16-bit peak, {source}. The cache is not in them.",
        f"Network: {gradients} of gradients a step, summed in a ring over {needs.bandwidth:g} GB/s "
        "(needs.bandwidth=), none of it during the arithmetic.",
    ]
    for card in needs.cards:
        limit = pace(config, found, card).limit
        lines.append(
            f"{card}: the network takes longer than the arithmetic from {limit:,} GPUs on."
        )
    if not needs.prices:
        lines.append("Costs: give needs.prices=[...], US dollars of a GPU-hour for each card.")
    return lines


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return f"| {BETWEEN.join(cells)} |"
