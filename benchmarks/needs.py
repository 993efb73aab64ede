"""`python -m benchmarks.needs`: hours, memory and disk of the published DiffusionDPO recipes.

For named GPUs; counted, not measured.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from peft import LoraConfig

from deradiff.data.cache import images_at_once
from deradiff.models.families import FAMILIES
from deradiff.models.peak_memory import encoding_bytes, weight_bytes
from deradiff.models.published import (
    AUTOENCODER,
    COMPARED_GPUS,
    DATA_SETS,
    DENOISERS,
    GPUS,
    PUBLISHED_RUNS,
    published_dpo,
)
from deradiff.models.requirements import Requirements, cache_bytes, dpo_requirements

RANK = 16
UTILISATION = 0.4  # assumed
PIXELS_PER_LATENT = 8
DATA = DATA_SETS["pickapic_v2"]


def requirements(family: str, method: str) -> Requirements:
    """What the published run needs one pair at a time, checkpointing as published."""
    run = PUBLISHED_RUNS[family]
    side = DENOISERS[family]["sample_size"]
    return dpo_requirements(
        DENOISERS[family],
        side,
        side,
        run.steps,
        run.pairs,
        method=method,
        lora=LoraConfig(r=RANK, target_modules=list(FAMILIES[family].lora_targets)),
        optimizer=run.optimizer if method == "full" else "adamw",
        checkpointing=run.checkpointing,
    )


def encoding_memory(family: str) -> float:
    """Bytes that one device needs while the cache of a published model is built."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AUTOENCODER).type(torch.float16)
    resolution = PIXELS_PER_LATENT * DENOISERS[family]["sample_size"]
    images = images_at_once(resolution, vae.dtype)
    return weight_bytes(vae) + encoding_bytes(FAMILIES[family], vae, resolution, images)


def table_row(family: str, method: str) -> list[str]:
    """One recipe as text: FLOPs, hours by GPU, memory, GPUs that it fits on, cache, data set."""
    # What the recipe needs.
    needed = requirements(family, method)
    side = DENOISERS[family]["sample_size"]
    cache = cache_bytes(DENOISERS[family], side, side, 2 * DATA.rows, DATA.captions or DATA.rows)

    # Hours on each GPU, and the GPUs whose memory is large enough.
    gpus = {name: GPUS[name] for name in COMPARED_GPUS}
    hours = [f"{needed.hours(gpu.tflops, UTILISATION):,.0f}" for gpu in gpus.values()]
    encoding = encoding_memory(family)
    memory = max(needed.memory, encoding)
    fitting = [name for name, gpu in gpus.items() if memory < gpu.memory]
    return [
        f"{family} {method}",
        f"{needed.flops / 1e18:.1f}",
        *hours,
        f"{needed.memory / 1e9:.1f}",
        f"{encoding / 1e9:.1f}",
        ", ".join(fitting) or "none",
        f"{cache / 1e9:.0f}",
        f"{DATA.bytes / 1e9:.0f}",
    ]


def main() -> None:
    """Print the table."""
    hours = [f"h, {name}" for name in COMPARED_GPUS]
    memory = ["GB a GPU", "GB to encode", "fits"]
    head = ["recipe", "EFLOP", *hours, *memory, "cache, GB", "data set, GB"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for family in PUBLISHED_RUNS:
        for method in ("full", "lora"):
            print("| " + " | ".join(table_row(family, method)) + " |")
    print(
        f"\nGPU-hours at {UTILISATION:.0%} of the peak, which is assumed; memory without sharding, "
        "of training steps (see deradiff/models/requirements.py).\n"
        f"LoRA: rank {RANK}. Data: Pick-a-Pic v2, ties and unlabelled rows too.\n\n"
        f"The paper's row: {published_dpo().why}"
    )


if __name__ == "__main__":
    main()
