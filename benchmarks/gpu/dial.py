"""The checks of the dial: what each mode costs, the bits at its ends, offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, CannotRun, deterministic
from benchmarks.gpu.rows import Finding
from benchmarks.sample import PLAIN, Stopwatch, Variant
from benchmarks.train import forget_peak, peak_memory
from deradiff import realign

PROFILED = ("", "exact")
"""The variants of which it is measured how busy the GPU is: a profile takes seconds."""

ROWS_PER_IMAGE = 2
"""Rows of the denoiser's batch: without the prompt, and with it."""


def plain_check(images: int) -> str:
    """The name of the check of the plain pipeline."""
    return check_name(Variant(PLAIN, "", {}), images)


def check_name(variant: Variant, images: int) -> str:
    """The name of the check of one variant."""
    return f"sample {images}: {variant.anchor} {variant.name}".rstrip()


def cost(bench: Bench, variant: Variant, images: int) -> Finding:
    """The seconds of an image in one mode.

    Args:
        bench: what is sampled.
        variant: the anchor and the mode; the plain pipeline.
        images: of a batch.
    """
    return _timed(bench, bench.stopwatch(variant.anchor, images), variant)


@torch.no_grad()
def _timed(bench: Bench, watch: Stopwatch, variant: Variant) -> Finding:
    """Time one variant after it has warmed up."""
    images = watch.args.batch
    forget_peak(bench.device)
    with watch.realigned(variant) as dial:
        if variant.options.get("compile"):
            # Passes are recorded when they come again.
            watch.call(steps=bench.size.few_steps)
        outputs: list[Tensor] = []
        seconds = bench.seconds(lambda: outputs.append(watch.call())) / images
        evaluations = dial.evaluations if dial else 1.0
        memory = peak_memory(bench.device)
        busy = None
        if images == 1 and variant.name in PROFILED:
            busy = bench.busy(lambda: watch.call(steps=bench.size.few_steps))
    steps = watch.args.steps
    return Finding(
        seconds,
        f"image, {steps} steps",
        forwards=ROWS_PER_IMAGE * steps * evaluations,
        beside="" if variant.anchor == PLAIN else plain_check(images),
        busy=busy,
        memory=memory,
        note=f"{evaluations:.3g} evaluations a step",
        problem="" if bool(outputs[0].isfinite().all()) else "the latents are not finite",
    )


def compiled_cost(bench: Bench, variant: Variant) -> Finding:
    """The seconds of an image in one mode, compiled, beside the plain pipeline without.

    Where `realign` compiles, it is asked to; the plain pipeline is compiled block by block.
    """
    watch = bench.stopwatch(variant.anchor, 1)
    if variant.anchor != PLAIN:
        variant = variant._replace(options=variant.options | {"compile": True})
    elif not _is_compiled(watch.pipe.unet):
        watch.pipe.unet.compile_repeated_blocks(fullgraph=True)
    found = replace(_timed(bench, watch, variant), beside=plain_check(1))
    if variant.anchor == PLAIN:
        # The next variant starts from a pipeline as it is loaded.
        bench.forget_pipeline()
    return found


def _is_compiled(network: Any) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())


# The bits at the ends


@torch.no_grad()
def ends(bench: Bench, kind: str, lam: float) -> Finding:
    """At lam 0 the dial gives the reference's bits, at lam 1 the anchor's.

    Args:
        bench: what is sampled.
        kind: of the anchor: `lora` or `full`.
        lam: 0 or 1.
    """
    watch = bench.stopwatch(kind, 1)
    steps = bench.size.few_steps
    with deterministic():
        with realign(watch.pipe, watch.anchors[kind], lam):
            ours = watch.call(steps=steps)
        expected = reference = watch.call(steps=steps)
        if lam:
            with _stock_anchor(bench, watch, kind):
                expected = watch.call(steps=steps)
    name = "anchor" if lam else "reference"

    problem = ""
    if not bool(expected.isfinite().all()):
        problem = f"the {name}'s latents are not finite"
    elif lam and torch.equal(reference, expected):
        problem = "the anchor's latents are the reference's"
    elif not torch.equal(ours, expected):
        apart = float((ours.float() - expected.float()).abs().max())
        problem = f"the latents are not those of the {name}: {apart:.2g} apart"
    return Finding(note=f"the bits of the {name} in the stock pipeline", problem=problem)


@contextmanager
def _stock_anchor(bench: Bench, watch: Stopwatch, kind: str) -> Iterator[None]:
    """The stock pipeline with the anchor's weights, as diffusers loads them."""
    pipe = watch.pipe
    if kind == "lora":
        pipe.load_lora_weights(bench.folder / "lora")
        try:
            yield
        finally:
            pipe.unload_lora_weights()
        return
    own = pipe.unet
    pipe.unet = watch.anchors[kind].network(own, own.device, own.dtype)
    try:
        yield
    finally:
        pipe.unet = own


# Offloading

OFFLOADS: dict[str, Callable[[Any], None]] = {
    "whole networks": lambda pipe: pipe.enable_model_cpu_offload(),
    "layer by layer": lambda pipe: pipe.enable_sequential_cpu_offload(),
}
"""diffusers' ways to keep weights off the GPU."""


@torch.no_grad()
def offload(bench: Bench, how: str) -> Finding:
    """A LoRA in mode exact on an offloaded pipeline gives the bits of one that is not.

    Args:
        bench: what is sampled.
        how: a key of OFFLOADS.
    """
    if bench.device.type == "cpu":
        raise CannotRun("diffusers offloads from a GPU, and this is a CPU")
    watch = bench.stopwatch("lora", 1)
    steps = bench.size.few_steps
    latents: list[Tensor] = []

    def sample() -> None:
        with realign(watch.pipe, watch.anchors["lora"], 0.5):
            latents.append(watch.call(steps=steps))

    with deterministic():
        sample()
        OFFLOADS[how](watch.pipe)
        forget_peak(bench.device)
        seconds = bench.seconds(sample)
    same = torch.equal(latents[0], latents[1])
    memory = peak_memory(bench.device)
    # Hooks of offloading leave traces.
    bench.forget_pipeline()
    return Finding(
        seconds,
        f"image, {steps} steps, LoRA loaded",
        forwards=2 * ROWS_PER_IMAGE * steps,
        memory=memory,
        note="the bits of a pipeline that is not offloaded",
        problem="" if same else "the latents are not those of a pipeline that is not offloaded",
    )
