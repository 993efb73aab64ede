"""The README of an anchor folder, which makes it a complete repository on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deradiff.anchors.anchor import AnchorCard
from deradiff.files import write_atomic
from deradiff.hub import is_hub_id
from deradiff.models.families import FAMILIES

GRID = "grid.png"
LOCAL = "path/to/this/folder"
TEXT = """---
library_name: diffusers
pipeline_tag: text-to-image
{front}tags:
- deradiff
- diffusion-dpo
- {family}
{lora}---

# {title}

An **anchor** for DeRaDiff (ICLR 2026): {base}, aligned once by Diffusion-DPO at beta = {beta}. While sampling, `lam` sets how strongly
it is aligned: 0 is the base model, 1 this anchor, and `lam` imitates a model that was trained at beta / `lam`.

{grid}```python
with deradiff.realign(pipe, "{repo}", lam=0.5):
    image = pipe("a red fox in the snow").images[0]
```

where `pipe` is the base model as diffusers loads it:

```python
import deradiff
{imports}
pipe = {pipeline}.from_pretrained({loaded})
```

Without deradiff, at lambda = 1: `{stock}`.

## Beta

{beta}, in the convention `{convention}`: it multiplies half the difference of the errors, each a mean over channels, height
and width, as the published code has it; diffusers' example calls half of this number beta.

## Recipe

| | |
|---|---|
{recipe}

## Cost

{hours:.3g} GPU-hours on {device}; {flops:.3g} FLOPs (forward and backward passes of the denoisers, counted on the model's own config).
"""


def write_model_card(
    folder: Path, card: AnchorCard, recipe: Mapping[str, object], repo: str | None = None
) -> None:
    """`README.md` of an anchor folder. recipe: rows of its table, besides what the card knows. repo: the hub repository that it is for."""
    family, where = FAMILIES[card.family], repo or LOCAL
    pipeline = {"pipeline": family.pipeline, "repo": where, "base": card.base_model}
    if card.method == "lora":
        stock = f'pipe.load_lora_weights("{where}")'
    else:
        stock = f'pipe.{family.denoiser} = type(pipe.{family.denoiser}).from_pretrained("{where}", subfolder="{family.denoiser}")'
    # The hub takes nothing but ids of its own there; a folder of one machine, or what ships with deradiff, is told in the text alone.
    on_hub = is_hub_id(card.base_model) and not Path(card.base_model).exists()
    relation = "adapter" if card.method == "lora" else "finetune"
    front = f"base_model: {card.base_model}\nbase_model_relation: {relation}\n" if on_hub else ""
    shipped, imports = (
        card.base_model.startswith("asset:"),
        f"from diffusers import {family.pipeline}\n",
    )
    loaded = f'locate("{card.base_model}")' if shipped else f'"{card.base_model}"'
    loaded += f', revision="{card.base_revision}"' if card.base_revision else ""
    rows = {
        "method": card.method,
        "objective": card.objective,
        "data": card.dataset,
        "steps": card.steps,
        "pairs seen": card.pairs_seen,
        "seed": card.seed,
        **recipe,
        "code": card.git_commit or "not a checkout",
        **card.versions,
    }
    beta = "unknown" if card.beta is None else f"{card.beta:g}"
    grid = f"![Prompts down, lambda across]({GRID})\n\n" if (folder / GRID).is_file() else ""
    text = TEXT.format(
        **pipeline,
        front=front,
        imports="from deradiff.files import locate\n" * shipped + imports,
        loaded=loaded,
        family=card.family,
        stock=stock,
        grid=grid,
        title=where.split("/")[-1] if repo else f"{card.family}, beta {beta}",
        lora="- lora\n" if card.method == "lora" else "",
        beta=beta,
        convention=card.beta_convention,
        recipe="\n".join(f"| {k} | {v} |" for k, v in rows.items()),
        hours=card.gpu_hours,
        device=card.device,
        flops=card.flops,
    )
    write_atomic(folder / "README.md", text)
