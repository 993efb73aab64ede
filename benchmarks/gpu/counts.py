"""What is counted while the device works: the networks' FLOPs, and the memory that is estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from peft import LoraConfig

from benchmarks.gpu.rows import CUT, FAILED, NOT_RUN, OK, Costs, Finding, Row
from benchmarks.gpu.sizes import Size
from benchmarks.gpu.training import FIRST_BETA
from benchmarks.random_pipelines import PIXELS_PER_LATENT
from benchmarks.train import METHODS, RANK
from deradiff.models.families import FAMILIES
from deradiff.models.flops import denoiser_flops, encoder_flops
from deradiff.models.published import AUTOENCODER
from deradiff.models.requirements import dpo_requirements

PRECISION = "bf16"
"""Memory is compared in one precision: the other one takes as much."""

TOLERANCE = 0.15
"""What an estimate may differ by, as a share of the measured peak."""


@dataclass(frozen=True)
class Counts:
    """What the networks of a size cost.

    Attributes:
        costs: FLOPs, by network.
        memory: bytes that a training is estimated to take, by network and method.
    """

    costs: Mapping[str, Costs]
    memory: Mapping[tuple[str, str], float]


def count(size: Size) -> Counts:
    """Count on the meta device; it takes half a minute for the published networks."""
    costs = {}
    memory = {}
    for network, work in size.works.items():
        side = work.resolution // PIXELS_PER_LATENT
        config = work.pipeline.denoiser_config(side)
        vae = AUTOENCODER | {"block_out_channels": list(work.pipeline.autoencoder)}
        costs[network] = Costs(
            denoiser_flops(config, side, side), encoder_flops(vae, work.resolution, work.resolution)
        )
        lora = LoraConfig(r=RANK, target_modules=list(FAMILIES[network].lora_targets))
        for method in METHODS:
            needed = dpo_requirements(
                config,
                side,
                side,
                work.steps,
                work.pairs_per_step,
                method=method,
                checkpointing=work.checkpointing,
                batch=work.pairs_per_step,
                lora=lora,
            )
            memory[network, method] = needed.memory
    return Counts(costs, memory)


def estimate_rows(rows: Sequence[Row], counts: Counts, is_gpu: bool) -> list[Row]:
    """A row for each estimate of memory, beside the measured peak of the same training.

    Args:
        rows: of the trainings.
        counts: what was counted.
        is_gpu: whether the peaks are a GPU's; a process on a CPU holds its libraries, too, and no
            judgement is made.
    """
    found = []
    for (network, method), estimate in counts.memory.items():
        group = f"{network} {PRECISION}"
        name = f"train {method}: {FIRST_BETA}"
        trained = [row for row in rows if (row.group, row.check) == (group, name)]
        if not trained:
            continue  # the section was not asked for
        measured = trained[0]
        check = f"memory {method}: estimate"
        if measured.finding.memory is None:
            why = f"the row {name!r} has no peak to compare with"
            status = CUT if measured.status == CUT else NOT_RUN
            found.append(Row(group, check, status, Finding(note=why)))
            continue

        # The estimate as a share of what was measured.
        share = estimate / measured.finding.memory
        text = f"{share:.0%} of the measured {measured.finding.memory / 1e9:.1f} GB"
        is_far = is_gpu and abs(share - 1) > TOLERANCE
        problem = f"{text}: more than {TOLERANCE:.0%} off" if is_far else ""
        finding = Finding(memory=estimate, note=text, problem=problem)
        found.append(Row(group, check, FAILED if is_far else OK, finding))
    return found
