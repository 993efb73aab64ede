"""Lambda in a notebook: one call gives images, their path KL and scores, a grid and a slider."""

from __future__ import annotations

import base64
import html
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from PIL import Image

from deradiff.image_tables import encode_png
from deradiff.images import labelled_grid
from deradiff.progress import progress_bar
from deradiff.realignment.context import Source, realign
from deradiff.scorers import ScorerSpec, check_prompts, load_spec

QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
TILE = 192
"""Pixels of the longer side of an image in a grid."""


@dataclass(frozen=True)
class Sweep:
    """The images of some prompts and seeds over lambda.

    A notebook shows it as a slider where ipywidgets is installed, and as a grid elsewhere.

    Attributes:
        table: a row an image: `prompt`, `seed`, `lam`, `path_kl` (nats), `evaluations` (of the
            network, for each one that the plain pipeline makes), a column for each scorer, and
            `image` (PIL).
        scorers: the names of the columns of scores.
    """

    table: pd.DataFrame
    scorers: tuple[str, ...] = ()

    @property
    def lams(self) -> list[float]:
        """Lambda, ascending."""
        return sorted(self.table["lam"].unique().tolist())

    def grid(self, tile: int = TILE) -> Image.Image:
        """One image of all: prompts and seeds down, lambda across.

        Args:
            tile: the longer side of an image, in pixels.
        """
        rows = []
        for label, images in self._by_row():
            rows.append((label, list(images["image"])))
        return labelled_grid(rows, [f"lam {lam:g}" for lam in self.lams], tile)

    def slider(self) -> Any:
        """One slider over lambda for all prompts and seeds; needs ipywidgets."""
        import ipywidgets

        pictures = ipywidgets.HTML()
        slider = ipywidgets.SelectionSlider(
            options=[(f"{lam:g}", lam) for lam in self.lams],
            value=self.lams[-1],
            description="lam",
        )

        def show(change: Any) -> None:
            pictures.value = self.page(change["new"])

        slider.observe(show, "value")
        show({"new": slider.value})
        return ipywidgets.VBox([slider, pictures])

    def page(self, lam: float) -> str:
        """HTML of all images at one lambda. Prompts are text, whatever they hold.

        Args:
            lam: one of `lams`.
        """
        cards = []
        for row in self.table[self.table["lam"] == lam].to_dict("records"):
            png = base64.b64encode(encode_png(row["image"])).decode()
            prompt = html.escape(row["prompt"], quote=True)
            numbers = [f"path KL {row['path_kl']:.3g}"]
            numbers += [f"{html.escape(name)} {row[name]:.3g}" for name in self.scorers]
            cards.append(
                f'<figure style="margin:0"><img width="{TILE}" alt="{prompt}" '
                f'src="data:image/png;base64,{png}"><figcaption style="max-width:{TILE}px">'
                f"{prompt}, seed {row['seed']}<br>{'<br>'.join(numbers)}</figcaption></figure>"
            )
        return f'<div style="display:flex;flex-wrap:wrap;gap:1em">{"".join(cards)}</div>'

    def _ipython_display_(self) -> None:
        """Show itself in a notebook."""
        from IPython.display import display

        has_widgets = importlib.util.find_spec("ipywidgets") is not None
        display(self.slider() if has_widgets else self.grid())

    def _by_row(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """A label, and the images of a prompt and seed by lambda."""
        for (prompt, seed), images in self.table.groupby(["prompt", "seed"], sort=False):
            yield f"{prompt}, seed {seed}", images.sort_values("lam")


def sweep(
    pipe: Any,
    anchor: Source | Sequence[Source],
    lams: Sequence[float] = QUARTERS,
    prompts: str | Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    *,
    scorers: Sequence[str] = (),
    mode: str = "exact",
    batch_size: int = 4,
    **call: Any,
) -> Sweep:
    """Sample prompts and seeds over lambda, from the same noise.

    An image is what `pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)` gives
    inside `deradiff.realign` at its lambda, but for the rounding of a batch.

    Args:
        pipe: a diffusers pipeline.
        anchor: as `deradiff.realign` takes it; one, not several.
        lams: numbers; 0 is the reference, 1 the anchor.
        prompts: one prompt or several.
        seeds: an image for each.
        scorers: names that `deradiff.load_scorer` knows.
        mode: how the mixture is evaluated, as of `deradiff.realign`.
        batch_size: images sampled at once.
        call: further arguments of the pipeline's call, such as `num_inference_steps=20`.

    Raises:
        ValueError: for no prompt, seed or lambda, and as `deradiff.realign` and
            `deradiff.load_scorer` do, before an image is sampled.

    Example:
        ```python
        found = deradiff.sweep(pipe, anchor, lams=[0, 0.5, 1], prompts="a fox", seeds=[0, 1])
        found.table.groupby("lam")["path_kl"].mean()
        found.grid().save("foxes.png")
        found  # in a notebook: a slider
        ```
    """
    # Mistakes first
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for name, values in (("prompts", prompts), ("seeds", seeds), ("lams", lams)):
        if not len(values):
            raise ValueError(f"{name} is empty: give at least one")
    specs = [ScorerSpec(name) for name in scorers]
    for spec in specs:
        check_prompts(spec, prompts)
    judges = {spec.name: load_spec(spec, device=str(pipe.device)) for spec in specs}

    # Sample
    wanted = list(itertools.product(prompts, seeds))
    rows: list[dict[str, Any]] = []
    with (
        realign(pipe, anchor, lams[0], mode=mode, path_kl=True) as dial,
        _without_own_bar(pipe),
        progress_bar(len(wanted) * len(lams), "sweep", "image") as progress,
    ):
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            for lam in lams:
                dial.lam = float(lam)
                images = _sampled(pipe, batch, call)
                path_kl = dial.path_kl.flatten().tolist()
                for (prompt, seed), image, kl in zip(batch, images, path_kl, strict=True):
                    row = {"prompt": prompt, "seed": seed, "lam": float(lam), "path_kl": kl}
                    rows.append(row | {"evaluations": dial.evaluations, "image": image})
                progress.update(len(batch))

    # Score
    table = pd.DataFrame(rows)
    for name, judge in judges.items():
        table[name] = judge(list(table["image"]), list(table["prompt"])).tolist()
    return Sweep(table, tuple(judges))


@contextmanager
def _without_own_bar(pipe: Any) -> Iterator[None]:
    """Without the pipeline's bar of steps, of which there would be one a batch."""
    name = "_progress_bar_config"
    had = getattr(pipe, name, None)
    pipe.set_progress_bar_config(**{**(had or {}), "disable": True})
    try:
        yield
    finally:
        if had is None:
            delattr(pipe, name)
        else:
            setattr(pipe, name, had)


def _sampled(
    pipe: Any, batch: Sequence[tuple[str, int]], call: dict[str, Any]
) -> list[Image.Image]:
    """The images of prompts and seeds, each from noise that its seed alone says."""
    generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
    prompts = [prompt for prompt, _ in batch]
    return pipe(prompt=prompts, generator=generators, **call).images
