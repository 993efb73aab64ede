"""`python -m benchmarks.needs`: hours, memory and disk of the published DiffusionDPO recipes on named GPUs, counted and not measured."""

from __future__ import annotations

from deradiff.models.flops import published_dpo
from deradiff.models.published import DATA_SETS, DENOISERS, GPUS, RECIPES
from deradiff.models.requirements import UTILISATION, Needs, cache_bytes, dpo_needs

RANK = 16
DATA = DATA_SETS["pickapic_v2"]


def needs(family: str, method: str) -> Needs:
    """Of 2000 steps of 2048 pairs on an A100, one pair at a time, gradient checkpointing as the launcher has it."""
    from peft import LoraConfig

    from deradiff.models.families import FAMILIES

    recipe, side = RECIPES[family], DENOISERS[family]["sample_size"]
    lora = LoraConfig(r=RANK, target_modules=list(FAMILIES[family].lora_targets))
    optimizer = recipe.optimizer if method == "full" else "adamw"
    return dpo_needs(
        DENOISERS[family],
        side,
        side,
        recipe.steps,
        recipe.pairs,
        GPUS["A100-80GB"].tflops,
        method=method,
        lora=lora,
        optimizer=optimizer,
        checkpointing=recipe.checkpointing,
    )


def main() -> None:
    head = [
        "recipe",
        "EFLOP",
        *(f"h, {name}" for name in GPUS),
        "GB a GPU",
        "fits",
        "cache, GB",
        "data set, GB",
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for family in RECIPES:
        side = DENOISERS[family]["sample_size"]
        cache = cache_bytes(
            DENOISERS[family], side, side, 2 * DATA.rows, DATA.captions or DATA.rows
        )
        for method in ("full", "lora"):
            found = needs(family, method)
            hours = [
                f"{found.hours * GPUS['A100-80GB'].tflops / gpu.tflops:,.0f}"
                for gpu in GPUS.values()
            ]
            fits = (
                ", ".join(name for name, gpu in GPUS.items() if found.memory < gpu.memory) or "none"
            )
            row = [
                f"{family} {method}",
                f"{found.flops / 1e18:.1f}",
                *hours,
                f"{found.memory / 1e9:.1f}",
                fits,
            ]
            print("| " + " | ".join([*row, f"{cache / 1e9:.0f}", f"{DATA.bytes / 1e9:.0f}"]) + " |")
    print(
        f"\nGPU-hours at {UTILISATION:.0%} of the peak, which is assumed; memory without sharding, a lower bound (see deradiff/needs.py)."
    )
    print(
        f"LoRA: rank {RANK}. Data: Pick-a-Pic v2, ties and unlabelled rows too.\n\nThe paper's row: {published_dpo().why}"
    )


if __name__ == "__main__":
    main()
