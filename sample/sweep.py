"""A sweep: every image of a resolved config that is missing, by all processes together."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState

from configs.tracking import Tracker, tracker
from deradiff.anchors.anchor import Anchor, cards_digest
from deradiff.data.prompts import Prompt
from deradiff.digests import anchor_digest
from deradiff.files import slug, write_atomic
from deradiff.image_files import read_image
from deradiff.image_tables import encode_png
from deradiff.images import labelled_grid
from deradiff.models.base_model import BaseModel
from deradiff.progress import progress_bar
from deradiff.realignment.dial import BeyondAnchorWarning, NegativeLambdaWarning
from deradiff.realignment.resampling import GuidedParticlesWarning
from deradiff.run_directories import claim
from deradiff.terminal import say
from sample.announce import announcement, cost, lams_text
from sample.batches import Batch, batches_to_sample, plan, wanted_images
from sample.config import SampleConfig
from sample.manifest import Lams, Record, image_path, intact, merge, save_image
from sample.sampling import Images, PromptSeed, load_sampler, mode_options

# Other values of these make more images, not other ones.
EXTENDS = (
    "lambdas",
    "targets",
    "prompts",
    "prompts_limit",
    "seeds",
    "batch_size",
    "batched",
    "read_pickled_tensors",
    "path_kl",
    "bake",
    "runs",
    "name",
    "tracking",
    "model.name",
    "model.resolution",
)
ANNOUNCED = (BeyondAnchorWarning, GuidedParticlesWarning, NegativeLambdaWarning)
"""Warnings of `realign` that the stage has said before its progress bar."""

GRID = "grid.png"
GRID_ROWS = 12
"""A taller grid is no longer looked at."""

GRID_TILE = 192
"""Longer side of an image in the grid, in pixels."""

TABLE_ROWS = 64
"""Prompts in the tracker's table of images."""


class Sweep:
    """One resolved run.

    Args:
        config: of the run.
        base: the base model.
        anchors: the anchors.
        prompts: what is sampled.
        run_dir: the run directory.
        state: this process among all.
    """

    def __init__(
        self,
        config: SampleConfig,
        base: BaseModel,
        anchors: Sequence[Anchor],
        prompts: Sequence[Prompt],
        run_dir: Path,
        state: PartialState,
    ) -> None:
        self.config = config
        self.base = base
        self.anchors = anchors
        self.prompts = prompts
        self.run_dir = run_dir
        self.state = state

    def run(self) -> None:
        """Sample what is missing, and leave the manifest and the grid.

        The processes share the prompts. The main one says what is done, and merges.
        """
        state = self.state
        settings = asdict(self.config) | mode_options(self.config)
        settings["anchor_sha256"] = _digest(self.anchors)
        if state.is_main_process:
            for anchor in self.anchors:
                anchor.check_weights()
            claim(self.run_dir, settings, EXTENDS)
            self._check_cards(merge(self.run_dir))
            device = f"{state.num_processes} x {state.device}"
            count = len(self.prompts)
            say(*announcement(self.config, self.base, self.anchors, count, device))
        state.wait_for_everyone()

        # Nobody writes before everybody has seen the same images, and so shares out the same rest
        done = intact(self.run_dir)
        if state.is_main_process:
            self._plan(done)
        state.wait_for_everyone()
        batches = batches_to_sample(self.run_dir, self._wanted, self._is_missing(done))
        group = slug(self.base.source)
        with tracker(
            self.config.tracking, "sample", self.run_dir, settings, state.is_main_process, group
        ) as track:
            self._declare_anchors(track)
            share = batches[state.process_index :: state.num_processes]
            count, seconds = sample_share(self, share, done)
            state.wait_for_everyone()
            if state.is_main_process:
                self._finish(track, count, seconds)
        state.wait_for_everyone()

    def _check_cards(self, records: Sequence[Record]) -> None:
        """Raise ValueError where images were sampled under another card of the same anchor."""
        for record in records:
            names = record["shares"] or [record["anchor"]]
            ours = [a for n, a in zip(self.config.anchors, self.anchors) if n in names]
            sampled_under = record["cards"]
            is_same = sampled_under == cards_digest(anchor.card for anchor in ours)
            if sampled_under and len(ours) == len(names) and not is_same:
                raise ValueError(
                    f"the card of {' or '.join(names)} is another than when {self.run_dir} was "
                    "sampled: restore it, or choose another name for this run"
                )

    @cached_property
    def _wanted(self) -> Batch:
        return wanted_images(self.prompts, self.config.seeds)

    def _is_missing(self, done: set[str]) -> Callable[[PromptSeed], bool]:
        """A function: whether at least one lambda of a prompt and seed is missing."""
        return lambda one: any(one.image(lams) not in done for lams in self.config.points)

    def _plan(self, done: set[str]) -> None:
        """Decide which of the missing images are sampled together."""
        assert self.config.batch_size  # decided before
        plan(
            self.run_dir,
            self._wanted,
            self._is_missing(done),
            self.config.batch_size,
            self.state.num_processes,
        )

    def _declare_anchors(self, track: Tracker) -> None:
        """Tell the tracker which training runs the anchors are from, under their names there."""
        for anchor in self.anchors:
            root = Path(anchor.root)
            if root.is_dir() and root.name == "anchor":
                track.uses(f"anchor-{root.absolute().parent.name}", "model")

    def _finish(self, track: Tracker, count: int, seconds: float) -> None:
        """Merge the manifest, draw the grid, and say what it cost."""
        records = merge(self.run_dir)
        show(self.config, self.prompts, self.run_dir, track)
        track.artifact(f"samples-{self.run_dir.name}", "samples", self.run_dir / "manifest.jsonl")
        say(*self._closing_lines(records, count, seconds))

    def _closing_lines(self, records: list[Record], count: int, seconds: float) -> list[str]:
        """What mixing cost, and where the images are."""
        pace = "every image was there"
        if count:
            pace = f"{count} images a process in {seconds:.1f} s, {seconds / count:.2f} s an image"
        mixing = cost(self.config, records)
        lines = [mixing] if mixing else []
        return [*lines, f"sample: {pace}; see {self.run_dir / GRID}"]


def sample_share(sweep: Sweep, share: Sequence[Batch], done: set[str]) -> tuple[int, float]:
    """Sample this process's share of the batches.

    Returns:
        How many images it made, and in how many seconds, loading aside.
    """
    if not share:
        return 0, 0.0
    config = sweep.config
    state = sweep.state
    count = 0
    for batch in share:
        for one in batch:
            count += sum(one.image(lams) not in done for lams in config.points)
    pipe = load_sampler(config, sweep.base, state.device)
    images = Images(pipe, config, sweep.anchors, done)
    start = time.monotonic()
    with (
        warnings.catch_warnings(),
        progress_bar(count, "sample", "image", is_shown=state.is_main_process) as bar,
    ):
        for category in ANNOUNCED:
            warnings.simplefilter("ignore", category)
        for png, record in images.sample(share):
            save_image(sweep.run_dir, state.process_index, png, record)
            bar.update()
    return count, time.monotonic() - start


def show(config: SampleConfig, prompts: Sequence[Prompt], run_dir: Path, track: Tracker) -> None:
    """Draw grid.png, and give the tracker the same as a table: prompts down, lambdas across.

    At the first seed.
    """
    rows: list[tuple[str, list[Path]]] = []
    for prompt in prompts[:TABLE_ROWS]:
        names = [image_path(lams, prompt.prompt_id, config.seeds[0]) for lams in config.points]
        rows.append((prompt.text, [run_dir / name for name in names]))

    # Neighbours in a list of prompts are often alike: take rows from all over it
    spacing = math.ceil(len(rows) / GRID_ROWS)
    opened = []
    for text, files in rows[::spacing]:
        opened.append((text, [read_image(file) for file in files]))
    heads = [_head(lams) for lams in config.points]
    write_atomic(run_dir / GRID, encode_png(labelled_grid(opened, heads, GRID_TILE)))

    track.image("grid", run_dir / GRID)
    columns = ["prompt", *(f"lam={lams_text(lams)}" for lams in config.points)]
    cells: list[list[Any]] = [[text, *images] for text, images in rows]
    track.table("samples", columns, cells)


def _head(lams: Lams) -> str:
    """What stands above a column of the grid."""
    role = ""
    if not any(lams):
        role = "  reference"
    elif lams == (1.0,):
        role = "  anchor"
    return f"λ = {lams_text(lams)}{role}"


def _digest(anchors: Sequence[Anchor]) -> Any:
    """What tells the anchors' weights from others: a digest, or one for each of several."""
    digests = [anchor_digest(Path(anchor.root) / anchor.weights) for anchor in anchors]
    return digests[0] if len(digests) == 1 else digests
