"""The README of an anchor folder, with which the folder is a complete repository on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deradiff.anchors.anchor import BETA_CONVENTION, AnchorCard
from deradiff.files import write_atomic
from deradiff.hub import is_hub_id
from deradiff.models.families import FAMILIES
from deradiff.models.family import Family
from deradiff.texts import in_markdown, in_python, in_yaml

README = "README.md"
GRID = "grid.png"
LOCAL = "path/to/this/folder"
"""What stands for the anchor's place where it is not made for the hub."""

TEMPLATE = """---
{front_matter}
---

# {title}

An **anchor** for DeRaDiff (ICLR 2026): {base}, aligned once by {objective} at beta = {beta}.
While sampling, `lam` sets how strongly it is aligned: 0 is the base model, 1 this anchor, and `lam`
imitates a model that was trained at beta / `lam`.

{grid}```python
with deradiff.realign(pipe, "{place}", lam=0.5):
    image = pipe(prompt="a red fox in the snow").images[0]
```

where `pipe` is the base model as diffusers loads it:

```python
{load_base}
```

Without deradiff, at lambda = 1: `{load_anchor}`.

## Beta

{beta}, in the convention `{convention}`{explanation}.

## Recipe

| | |
|---|---|
{recipe}

## Cost

{hours:.3g} GPU-hours on {device}; {flops:.3g} FLOPs (forward and backward passes of the denoisers,
counted on the model's own config).
"""

OBJECTIVE_NAMES = {"dpo": "Diffusion-DPO"}
"""The names that the field has for objectives; any other is called as its card calls it."""

CALIBRATION_HEADING = "## Calibration\n"

EXPLANATIONS = {
    BETA_CONVENTION: """: it multiplies half the difference of the errors, each a
mean over channels, height and width, as the published code has it; diffusers' example calls half of
this number beta"""
}
"""What a convention of beta means, as the README goes on after its name."""


def write_model_card(
    folder: Path, card: AnchorCard, recipe: Mapping[str, object], repo: str | None = None
) -> None:
    """Write the `README.md` of an anchor folder.

    Args:
        folder: the anchor folder. A `grid.png` in it is shown.
        card: the anchor's card.
        recipe: what the table of the training says besides what the card knows.
        repo: the hub repository that the folder is for; None: it stays local.
    """
    family = FAMILIES[card.family]
    place = repo or LOCAL
    beta = "unknown" if card.beta is None else f"{card.beta:g}"
    title = place.split("/")[-1] if repo else f"{in_markdown(card.family)}, beta {beta}"
    grid = ""
    if (folder / GRID).is_file():
        grid = f"![Prompts down, lambda across]({GRID})\n\n"
    text = TEMPLATE.format(
        front_matter=_front_matter(card),
        title=title,
        base=in_markdown(card.base_model),
        objective=_objective_name(card),
        beta=beta,
        grid=grid,
        place=place,
        load_base=_load_base(card, family),
        load_anchor=_load_anchor(card, family, place),
        convention=card.beta_convention.replace("`", ""),
        explanation=EXPLANATIONS.get(card.beta_convention, ""),
        recipe=_recipe_rows(card, recipe),
        hours=card.gpu_hours,
        device=in_markdown(card.device),
        flops=card.flops,
    )
    write_atomic(folder / README, text)


def write_calibration(folder: Path, sentence: str) -> None:
    """Say in the `README.md` of an anchor folder what held-out pairs said of the anchor.

    Args:
        folder: the anchor folder; without a README nothing is written.
        sentence: the verdict, in place of an earlier one.
    """
    file = folder / README
    if not file.is_file():
        return
    text = file.read_text()
    kept, heading, rest = text.partition(CALIBRATION_HEADING)
    following = rest.find("\n## ") if heading else -1
    after = rest[following:] if following >= 0 else ""
    said = f"{CALIBRATION_HEADING}\n{in_markdown(sentence)}\n"
    write_atomic(file, f"{kept.rstrip()}\n\n{said}{after}")


def _objective_name(card: AnchorCard) -> str:
    """The objective as a sentence calls it."""
    code = card.objective.replace("`", "")
    return OBJECTIVE_NAMES.get(card.objective, f"the objective `{code}`")


def _front_matter(card: AnchorCard) -> str:
    """The YAML that the hub reads."""
    lines = ["library_name: diffusers", "pipeline_tag: text-to-image"]

    # The hub links a base model of its own, and takes nothing else here: no folder of one machine,
    # and nothing that ships with deradiff.
    if is_hub_id(card.base_model) and not Path(card.base_model).exists():
        relation = "adapter" if card.method == "lora" else "finetune"
        lines += [f"base_model: {card.base_model}", f"base_model_relation: {relation}"]

    objective = OBJECTIVE_NAMES.get(card.objective, card.objective).lower()
    lines += ["tags:", "- deradiff", f"- {in_yaml(objective)}", f"- {in_yaml(card.family)}"]
    if card.method == "lora":
        lines.append("- lora")
    return "\n".join(lines)


def _load_base(card: AnchorCard, family: Family) -> str:
    """The lines of Python that load the base model."""
    lines = ["import deradiff"]
    source = in_python(card.base_model)
    if card.base_model.startswith("asset:"):
        lines.append("from deradiff.assets import locate")
        source = f"locate({source})"
    lines.append(f"from diffusers import {family.pipeline}")
    revision = f", revision={in_python(card.base_revision)}" if card.base_revision else ""
    lines += ["", f"pipe = {family.pipeline}.from_pretrained({source}{revision})"]
    return "\n".join(lines)


def _load_anchor(card: AnchorCard, family: Family, place: str) -> str:
    """The line of Python that loads the anchor into a stock pipeline."""
    if card.method == "lora":
        return f'pipe.load_lora_weights("{place}")'
    network = f"pipe.{family.denoiser}"
    return f'{network} = type({network}).from_pretrained("{place}", subfolder="{family.denoiser}")'


def _recipe_rows(card: AnchorCard, recipe: Mapping[str, object]) -> str:
    """The rows of the table of the training."""
    values = {
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
    rows = []
    for key, value in values.items():
        rows.append(f"| {in_markdown(str(key))} | {in_markdown(str(value))} |")
    return "\n".join(rows)
