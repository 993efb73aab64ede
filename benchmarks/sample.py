"""What realignment costs: modes beside a plain model, a sweep beside the published loop, path KL.

    python -m benchmarks.sample                           the shapes world, on the CPU
    python -m benchmarks.sample --network sd15 --width 64      SD1.5's shape at a fifth of its width
    python -m benchmarks.sample --network sdxl --device cuda --dtype bfloat16 --pixels 1024
                                --steps 50 --batch 4 [--compile]

Networks other than the shapes world's have random weights. What is timed is denoising alone, with
guidance, without decoding: a decoder's time is the same in every mode and would flatter the ratios.
Repetitions are interleaved, and each ratio is of one repetition: median [lowest, highest]; of path
KL median [95 % interval of the median]. On the CPU seconds are the processor's.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import comb
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor

from benchmarks import published_loop
from benchmarks.random_pipelines import (
    PIXELS_PER_LATENT,
    PUBLISHED,
    SCHEDULE,
    TOKENS,
    made_on,
    pipeline_of,
    scaled_denoiser_config,
)
from deradiff import realign
from deradiff.anchors.anchor import Anchor, AnchorCard, load_anchor, save_anchor
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from deradiff.models.flops import denoiser_flops
from deradiff.models.gpus import MEASURED_TFLOPS
from deradiff.realignment import context, modes
from deradiff.realignment.carriers import LostTrack
from deradiff.realignment.modes import Companions, Mixed
from deradiff.realignment.networks import Networks
from deradiff.realignment.registry import MODES

PEAK = MEASURED_TFLOPS["H200"] * 1e12
"""FLOP/s in bfloat16 that an H200 was measured to reach."""

LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
GUIDANCE_SCALE = 5.0
RANK = 16
PLAIN = "plain"
"""What a table calls the pipeline that is not realigned."""


def timed_options() -> dict[str, dict[str, Any]]:
    """The options of `realign` that are timed, by the name of their row in the table."""
    defaults = inspect.signature(realign).parameters
    options: dict[str, dict[str, Any]] = {}
    for mode, spec in MODES.items():
        setting = spec.label.setting
        name = f"{mode}, {setting}={defaults[setting].default}" if setting else mode
        options[name] = {"mode": mode, "memory": "low"}
        if spec.batched:
            options[f"{name}, merged"] = {"mode": mode, "memory": "high"}
            options[f"{name}, batched"] = {"mode": mode, "memory": "low", "batched": True}
    return options


def random_pipeline(network: str, width: int, pixels: int) -> Any:
    """A pipeline around a random UNet of SD1.5's or SDXL's shape, without text encoder and VAE.

    Args:
        network: `sd15` or `sdxl`.
        width: channels of its first block; the published networks have 320.
        pixels: side of an image.
    """
    config = scaled_denoiser_config(network, width, pixels // PIXELS_PER_LATENT)
    unet = diffusers.UNet2DConditionModel.from_config(config)
    text_encoders = [None] * len(PUBLISHED[network].text_encoders)
    pipe = pipeline_of(unet, None, None, text_encoders)
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**SCHEDULE)
    return pipe


def make_pipeline(args: argparse.Namespace) -> Any:
    """The pipeline that the arguments name, ready to sample."""
    torch.manual_seed(0)
    if args.network == "shapes":
        pipe = BaseModel("asset:shapes/base").load_pipeline()
    else:
        with made_on(args.device, getattr(torch, args.dtype)):
            pipe = random_pipeline(args.network, args.width, args.pixels)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval().requires_grad_(False)
    return pipe.to(args.device, getattr(torch, args.dtype))


def full_anchor(pipe: Any, folder: Path) -> Anchor:
    """A full anchor in memory, whose weights differ a little from the reference's.

    Args:
        pipe: the pipeline.
        folder: not used: nothing is saved.
    """
    full = copy.deepcopy(pipe.unet)
    for parameter in full.parameters():
        parameter.mul_(1.01)
    return Anchor("full", "", "", "full", family=family_of(pipe).name, _network=full)


def lora_anchor(pipe: Any, folder: Path) -> Anchor:
    """A LoRA anchor.

    Args:
        pipe: the pipeline.
        folder: where it is saved, as `lora`.
    """
    # A new adapter changes nothing, so its second factors are drawn.
    family = family_of(pipe)
    adapted = copy.deepcopy(pipe.unet)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(family.lora_targets))
    adapted.add_adapter(config, adapter_name="default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    card = AnchorCard(base_model="random weights", family=family.name, method="lora", beta=None)
    save_anchor(folder / "lora", adapted, card)
    return load_anchor(folder / "lora")


ANCHORS: dict[str, Callable[[Any, Path], Anchor]] = {"lora": lora_anchor, "full": full_anchor}
"""What makes an anchor of each kind. What its weights are does not change what it costs."""


def embeddings(pipe: Any, batch: int) -> dict[str, Tensor]:
    """Random text embeddings in the shapes that the pipeline takes, a row an image."""
    # SDXL also takes pooled embeddings.
    config = pipe.unet.config
    width = config.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_embeds": (batch, TOKENS, width),
        "negative_prompt_embeds": (batch, TOKENS, width),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes["pooled_prompt_embeds"] = (batch, pooled)
        shapes["negative_pooled_prompt_embeds"] = (batch, pooled)

    # The values do not matter.
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        tensors[name] = values.to(pipe.unet.device, pipe.unet.dtype)
    return tensors


class Variant(NamedTuple):
    """A way to sample that is timed.

    Attributes:
        anchor: `lora` or `full`; `plain` without realignment.
        name: of its row in the table.
        options: of `realign`.
    """

    anchor: str
    name: str
    options: dict[str, Any]


def timed_variants(anchors: Iterable[str]) -> list[Variant]:
    """The plain pipeline, and every mode of each kind of anchor that it goes together with."""
    variants = [Variant(PLAIN, "", {})]
    for anchor in anchors:
        for name, options in timed_options().items():
            is_for_lora = "batched" in options or options["memory"] == "high"
            if anchor == "lora" or not is_for_lora:
                variants.append(Variant(anchor, name, options))
    return variants


class Stopwatch:
    """One pipeline with its anchors, whose calls are timed.

    Args:
        args: what the command line says.
        folder: for temporary files.
        kinds: of the anchors, keys of ANCHORS.
        pipe: the pipeline; None: the one that the arguments name.

    Attributes:
        pipe: the pipeline.
        anchors: by kind.
        prompts: encoded ones, as arguments of the pipeline's call.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        kinds: Iterable[str] = tuple(ANCHORS),
        pipe: Any = None,
    ) -> None:
        self.args = args
        self.pipe = make_pipeline(args) if pipe is None else pipe
        self.anchors = {kind: ANCHORS[kind](self.pipe, folder) for kind in kinds}
        self.prompts = embeddings(self.pipe, args.batch)
        if args.compile:
            self.pipe.unet.compile_repeated_blocks(fullgraph=True)

    def call(self, seed: int = 0, steps: int | None = None) -> Tensor:
        """One batch of latents."""
        generators = []
        for image in range(self.args.batch):
            generators.append(torch.Generator().manual_seed(1000 * seed + image))
        return self.pipe(
            **self.prompts,
            height=self.args.pixels,
            width=self.args.pixels,
            num_inference_steps=steps or self.args.steps,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
            generator=generators,
        ).images

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long `work` takes: on a GPU by the clock, on a CPU by the processor's time.

        A clock would also measure what else runs on the processor.
        """
        if self.args.device == "cpu":
            start = time.process_time()
            work()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    @contextmanager
    def realigned(self, variant: Variant) -> Iterator[Any]:
        """The pipeline in one variant, after one step of another chain.

        What a lambda needs once is then there, and no first step is remembered.
        """
        with ExitStack() as stack:
            dial = None
            if variant.anchor != PLAIN:
                anchor = self.anchors[variant.anchor]
                dial = stack.enter_context(realign(self.pipe, anchor, 0.5, **variant.options))
            self.call(seed=1, steps=1)
            yield dial

    def costs(self) -> list[dict[str, Any]]:
        """Each variant's seconds an image, and their ratio to a plain model's."""
        variants = timed_variants(self.anchors)

        # Every other repetition goes backwards: a machine that slows down is fair to all.
        seconds: list[list[float]] = [[] for _ in variants]
        evaluations = [1.0] * len(variants)
        for repetition in range(self.args.repeats):
            order = list(range(len(variants)))
            for i in order if repetition % 2 == 0 else reversed(order):
                with self.realigned(variants[i]) as dial:
                    seconds[i].append(self.seconds(self.call) / self.args.batch)
                    if dial:
                        evaluations[i] = dial.evaluations

        # Each variant's median, and its ratio to the plain model of the same repetition.
        plain = seconds[0]
        rows = []
        for variant, own, count in zip(variants, seconds, evaluations):
            row = {
                "anchor": variant.anchor,
                "mode": variant.name,
                "evaluations": count,
                "seconds": statistics.median(own),
                "seconds with range": with_range(own),
                "ratio": with_range([a / b for a, b in zip(own, plain)]),
            }
            rows.append(row)
        return rows

    def sweep(self, kind: str) -> dict[str, Any]:
        """Images a second of five lambdas, as the sample stage and as the published loop make them.

        Args:
            kind: of the anchor: `lora` or `full`.
        """
        unet = self.pipe.unet
        side = self.latent_side
        shape = (unet.config.in_channels, side, side)
        # The published loop holds two networks. Of a LoRA the second one is the merged network,
        # which costs what a plain one does.
        second_network = self.anchors["full"].network(unet, unet.device, unet.dtype)

        def sample_ours() -> None:
            with realign(self.pipe, self.anchors[kind], 0.0, shared_start=True) as dial:
                for lam in LAMBDAS:
                    dial.lam = lam
                    self.call()

        def sample_published() -> None:
            for image in range(self.args.batch):
                prompt = {name: rows[image : image + 1] for name, rows in self.prompts.items()}
                for lam in LAMBDAS:
                    published_loop.sample(
                        self.pipe,
                        second_network,
                        lam,
                        self.args.steps,
                        GUIDANCE_SCALE,
                        shape,
                        image,
                        prompt,
                    )

        # In turn, so that a machine that slows down is fair to both.
        images = self.args.batch * len(LAMBDAS)
        ours = []
        published = []
        for _ in range(self.args.repeats):
            ours.append(images / self.seconds(sample_ours))
            published.append(images / self.seconds(sample_published))
        return {
            "anchor": kind,
            "ours": with_range(ours),
            "published": with_range(published),
            "ratio": with_range([a / b for a, b in zip(ours, published)]),
        }

    def path_kl(self, kind: str) -> dict[str, str]:
        """What it costs that the outputs carry their companions, so that path KL is known.

        Mode exact at lambda 0.5, with companions and without. Both evaluate both networks, which
        takes nearly all of the time and varies by more than what is asked. So the networks' own
        seconds are taken off each call, and the difference is a share of the whole call.

        Args:
            kind: of the anchor: `lora` or `full`.
        """
        totals: list[float] = []
        beside: dict[bool, list[float]] = {True: [], False: []}
        with self.realigned(Variant(kind, "exact", {"mode": "exact"})) as dial:
            for repetition in range(self.args.repeats):
                # In turn, and every other repetition the other way round.
                order = (True, False) if repetition % 2 == 0 else (False, True)
                for is_measured in order:
                    with ExitStack() as stack:
                        if not is_measured:
                            stack.enter_context(patch.object(context, "carried", uncarried))
                            stack.enter_context(patch.object(modes, "_companions", no_companions))
                        networks = stack.enter_context(self._seconds_of_networks())
                        total = self.seconds(self.call)
                    beside[is_measured].append((total - sum(networks)) / self.args.batch)
                    if is_measured:
                        totals.append(total / self.args.batch)
                        assert dial.path_kl.isfinite().all()
        whole = statistics.median(totals)
        shares = [100 * (a - b) / whole for a, b in zip(beside[True], beside[False])]
        return {
            "anchor": kind,
            "whole": with_interval(totals),
            "known": with_interval(beside[True]),
            "unknown": with_interval(beside[False]),
            "share": with_interval(shares),
        }

    @contextmanager
    def _seconds_of_networks(self) -> Iterator[list[float]]:
        """The seconds of each evaluation of both networks, while it lasts."""
        seconds: list[float] = []
        evaluate = Networks.evaluate

        def timed(networks: Networks, *args: Any, **kwargs: Any) -> Any:
            outputs = []
            work = partial(evaluate, networks, *args, **kwargs)
            seconds.append(self.seconds(lambda: outputs.append(work())))
            return outputs[0]

        with patch.object(Networks, "evaluate", timed):
            yield seconds

    @property
    def latent_side(self) -> int:
        """Side of an image's latents."""
        return self.args.pixels // self.pipe.vae_scale_factor

    def flops(self) -> float:
        """FLOPs of one image of a plain model: two rows a step, with and without the prompt."""
        side = self.latent_side
        config = dict(self.pipe.unet.config)
        return 2 * self.args.steps * denoiser_flops(config, side, side, TOKENS)


def uncarried(mixed: Mixed, track: LostTrack, with_anchors: bool) -> Any:
    """A realigned output alone, in place of `deradiff.realignment.modes.carried`."""
    return mixed.output.whole()


def no_companions(tensors: Sequence[Tensor | None], weights: Sequence[Any]) -> Companions:
    """Nothing of what each model predicted, in place of the companions that modes keep."""
    return Companions(None, None, ())


def with_interval(values: list[float], digits: int = 3) -> str:
    """Median [its interval at 95 %, from the order of the values alone].

    Of fewer than six values the interval is their range, which is less sure.
    """
    # As many values are left off at either end as lie there with a probability of 2.5 % at most.
    ordered = sorted(values)
    count = len(ordered)
    rank = 0
    probability = 0.5**count
    while probability <= 0.025:
        rank += 1
        probability += comb(count, rank) * 0.5**count
    low = max(rank - 1, 0)
    high = count - 1 - low
    numbers = [statistics.median(ordered), ordered[low], ordered[high]]
    median, lowest, highest = (f"{number:.{digits}g}" for number in numbers)
    return f"{median} [{lowest}, {highest}]"


def with_range(values: list[float]) -> str:
    """Median [lowest, highest]."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )

    # What is sampled, and how.
    parser.add_argument("--network", choices=("shapes", "sd15", "sdxl"), default="shapes")
    parser.add_argument(
        "--width", type=int, default=320, help="channels of a random network's first block"
    )
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true")

    # What is printed.
    parser.add_argument("--table", choices=tuple(TABLES), help="one table alone")
    return parser.parse_args(arguments)


def print_costs(stopwatch: Stopwatch) -> None:
    """The table of modes."""
    flops = stopwatch.flops()
    print(f"{flops / 1e12:.4g} TFLOP an image of a plain model\n")
    print("| anchor | mode | evaluations | s an image | x plain | TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for row in stopwatch.costs():
        # A mode computes as many FLOPs more as it evaluates the networks more often.
        rate = flops * row["evaluations"] / row["seconds"]
        rate_text = f"{rate / 1e12:.3g}"
        if stopwatch.args.device == "cuda":
            rate_text += f" ({100 * rate / PEAK:.3g} %)"
        cells = [
            row["anchor"],
            row["mode"],
            f"{row['evaluations']:.3g}",
            row["seconds with range"],
            row["ratio"],
            rate_text,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_sweeps(stopwatch: Stopwatch) -> None:
    """The table of sweeps over lambda."""
    print("\n| sweep of 5 lambdas | images/s | published loop | x |\n|---|---|---|---|")
    for kind in stopwatch.anchors:
        row = stopwatch.sweep(kind)
        cells = [kind, row["ours"], row["published"], row["ratio"]]
        print(f"| {' | '.join(cells)} |", flush=True)


def print_path_kl(stopwatch: Stopwatch) -> None:
    """The table of path KL."""
    print("\n| exact, lambda 0.5 | s an image | beside the networks | path KL unknown | % |")
    print("|---|---|---|---|---|")
    for kind in stopwatch.anchors:
        row = stopwatch.path_kl(kind)
        cells = [row["anchor"], row["whole"], row["known"], row["unknown"], row["share"]]
        print(f"| {' | '.join(cells)} |", flush=True)


TABLES: dict[str, Callable[[Stopwatch], None]] = {
    "cost": print_costs,
    "sweep": print_sweeps,
    "path_kl": print_path_kl,
}
"""By name, in the order in which they are printed."""


def main(arguments: list[str] | None = None) -> None:
    """Time what the arguments name, and print the tables."""
    args = parse_arguments(arguments)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        stopwatch = Stopwatch(args, Path(folder))
        print(f"{args} on {device}, torch {torch.__version__}")
        for name in [args.table] if args.table else TABLES:
            TABLES[name](stopwatch)


if __name__ == "__main__":
    main()
