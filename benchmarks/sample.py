"""What realignment costs: each mode beside a plain model, and a sweep over lambdas beside the published loop.

python -m benchmarks.sample                                     the shapes world, on the CPU
python -m benchmarks.sample --network sd15 --width 64           SD1.5's shape at a fifth of its width, random weights
python -m benchmarks.sample --network sdxl --device cuda --dtype bfloat16 --pixels 1024 --steps 50 --batch 4 [--compile]

Denoising alone, guidance on, latents out: a decoder's time is the same in every mode, and would flatter the ratios. Repetitions are
interleaved, and each ratio is of one repetition; median [lowest, highest]. On the CPU seconds are the processor's.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import published_loop
from deradiff import realign
from deradiff.anchors.anchor import Anchor, AnchorCard, load_anchor, save_anchor
from deradiff.models.base_model import BaseModel
from deradiff.models.families import family_of
from deradiff.models.flops import denoiser_flops
from deradiff.models.published import MEASURED_TFLOPS
from deradiff.realignment.registry import MODES

PEAK = MEASURED_TFLOPS["H200"] * 1e12  # FLOP/s
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKENS = 77


def timed_options() -> dict[str, dict[str, Any]]:
    """The options of `realign` that are timed, by the name of their row in the table."""
    defaults = inspect.signature(realign).parameters
    options: dict[str, dict[str, Any]] = {}
    for mode, spec in MODES.items():
        setting = spec.label.setting
        name = f"{mode}, {setting}={defaults[setting].default}" if setting else mode
        options[name] = {"mode": mode}
        if spec.batched:
            options[f"{name}, batched"] = {"mode": mode, "batched": True}
    return options


def random_pipeline(network: str, width: int, pixels: int) -> Any:
    """SD1.5's or SDXL's UNet with its first block `width` channels wide (published: 320), random; no text encoder, no autoencoder."""
    import diffusers

    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    shared: dict[str, Any] = {"sample_size": pixels // 8, "norm_num_groups": 32}
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if network == "sd15":
        unet = diffusers.UNet2DConditionModel(
            **shared,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        return diffusers.StableDiffusionPipeline(
            **none,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    unet = diffusers.UNet2DConditionModel(
        **shared,
        block_out_channels=(width, 2 * width, 4 * width),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=tuple(max(1, width * k // 64) for k in (1, 2, 4)),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    none |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    return diffusers.StableDiffusionXLPipeline(
        **none, unet=unet, scheduler=scheduler, add_watermarker=False
    )


def make_pipeline(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    pipe = (
        BaseModel("asset:shapes/base").load_pipeline()
        if args.network == "shapes"
        else random_pipeline(args.network, args.width, args.pixels)
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval().requires_grad_(False)
    return pipe.to(args.device, getattr(torch, args.dtype))


def make_anchors(pipe: Any, folder: Path, rank: int = 16) -> dict[str, Anchor]:
    """A LoRA, and full weights that lie a little beside the reference's; what they are does not change what they cost."""
    from peft import LoraConfig

    family, generator = family_of(pipe), torch.Generator().manual_seed(1)
    full = copy.deepcopy(pipe.unet)
    for parameter in full.parameters():
        parameter.mul_(1.01)
    network = Anchor("full", "", "", "full", family=family.name, _network=full)
    adapted = copy.deepcopy(pipe.unet)
    adapted.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(family.lora_targets)),
        adapter_name="default",
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    save_anchor(
        folder / "lora",
        adapted,
        AnchorCard(base_model="", family=family.name, method="lora", beta=None),
    )
    return {"lora": load_anchor(folder / "lora"), "full": network}


def embeddings(pipe: Any, batch: int) -> dict[str, Tensor]:
    """Random text embeddings in the pipeline's shapes, a row an image."""
    config, generator = pipe.unet.config, torch.Generator().manual_seed(2)
    shapes = {
        f"{sign}prompt_embeds": (batch, TOKENS, config.cross_attention_dim)
        for sign in ("", "negative_")
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {f"{sign}pooled_prompt_embeds": (batch, pooled) for sign in ("", "negative_")}
    return {
        name: torch.randn(shape, generator=generator).to(pipe.unet.device, pipe.unet.dtype)
        for name, shape in shapes.items()
    }


class Bench:
    """One pipeline, its anchors, and a clock around calls of it."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.pipe = args, make_pipeline(args)
        self.anchors = make_anchors(self.pipe, folder)
        self.text = embeddings(self.pipe, args.batch)
        if args.compile:
            self.pipe.unet.compile_repeated_blocks(fullgraph=True)

    def call(self, seed: int = 0, steps: int | None = None) -> Tensor:
        """One batch of latents."""
        generators = [
            torch.Generator().manual_seed(1000 * seed + i) for i in range(self.args.batch)
        ]
        size = {"height": self.args.pixels, "width": self.args.pixels}
        options = {
            "num_inference_steps": steps or self.args.steps,
            "guidance_scale": 5.0,
            "output_type": "latent",
            "generator": generators,
        }
        return self.pipe(**self.text, **size, **options).images

    def seconds(self, work: Callable[[], Any]) -> float:
        """By the wall on a GPU; on a CPU of the processor's own, since a wall clock there measures the neighbours, too."""
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
    def mode(self, kind: str, options: dict[str, Any]) -> Iterator[Any]:
        """Realigned and warm: another chain ran a step, so that what a lambda needs once is there, and no first step is remembered."""
        with (
            realign(self.pipe, self.anchors[kind], 0.5, **options)
            if kind != "plain"
            else nullcontext() as dial
        ):
            self.call(seed=1, steps=1)
            yield dial

    def costs(self) -> list[dict[str, Any]]:
        """Each mode's seconds an image, and their ratio to a plain model's in the same repetition."""
        chosen = [("plain", "", {})] + [
            (k, n, o)
            for k in self.anchors
            for n, o in timed_options().items()
            if not (k == "full" and "batched" in o)
        ]
        times: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind, name, _ in chosen}
        evaluations = {}
        for repetition in range(self.args.repeats):
            for kind, name, options in chosen if repetition % 2 == 0 else chosen[::-1]:
                with self.mode(kind, options) as dial:
                    times[kind, name].append(self.seconds(self.call) / self.args.batch)
                    evaluations[kind, name] = dial.evaluations if dial else 1.0
        plain = times["plain", ""]
        return [
            {
                "anchor": kind,
                "mode": name,
                "evaluations": evaluations[kind, name],
                "seconds": spread(found),
                "ratio": spread([a / b for a, b in zip(found, plain)]),
            }
            for (kind, name), found in times.items()
        ]

    def sweep(self, kind: str) -> dict[str, Any]:
        """Images a second of five lambdas, as the sample stage makes them and as the published loop does, for the same images."""
        shape = (self.pipe.unet.config.in_channels, *[self.args.pixels // self._factor()] * 2)
        # The published loop holds two networks: of a LoRA the second is the merged one, which costs what a plain one does.
        anchor = self.anchors["full"].network(
            self.pipe.unet, self.pipe.unet.device, self.pipe.unet.dtype
        )

        def ours() -> None:
            with realign(self.pipe, self.anchors[kind], 0.0, shared_start=True) as dial:
                for dial.lam in LAMBDAS:
                    self.call()

        def published() -> None:
            for image in range(self.args.batch):
                prompt = {name: tensor[image : image + 1] for name, tensor in self.text.items()}
                for lam in LAMBDAS:
                    published_loop.sample(
                        self.pipe, anchor, lam, self.args.steps, 5.0, shape, image, prompt
                    )

        images, pairs = self.args.batch * len(LAMBDAS), []
        for _ in range(self.args.repeats):
            pairs.append((images / self.seconds(ours), images / self.seconds(published)))
        return {
            "anchor": kind,
            "ours": spread([a for a, _ in pairs]),
            "published": spread([b for _, b in pairs]),
            "ratio": spread([a / b for a, b in pairs]),
        }

    def _factor(self) -> int:
        return self.pipe.vae_scale_factor

    def flops(self) -> float:
        """Of one image of a plain model: conditional and unconditional rows at every step."""
        side = self.args.pixels // self._factor()
        return 2 * self.args.steps * denoiser_flops(dict(self.pipe.unet.config), side, side, TOKENS)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
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
    parser.add_argument("--table", choices=("cost", "sweep"), help="one table alone")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        print(
            f"{args} on {torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'}, torch {torch.__version__}"
        )
        if args.table != "sweep":
            print_costs(bench)
        if args.table != "cost":
            print("\n| sweep of 5 lambdas | images/s | published loop | x |\n|---|---|---|---|")
            for kind in bench.anchors:
                row = bench.sweep(kind)
                print(
                    f"| {kind} | {row['ours']} | {row['published']} | {row['ratio']} |", flush=True
                )


def print_costs(bench: Bench) -> None:
    flops = bench.flops()
    print(
        f"{flops / 1e12:.4g} TFLOP an image of a plain model\n\n| anchor | mode | evaluations | s an image | x plain | TFLOP/s |"
    )
    print("|---|---|---|---|---|---|")
    for row in bench.costs():
        rate = flops * row["evaluations"] / float(row["seconds"].split()[0])
        share = f"{rate / 1e12:.3g}" + (
            f" ({100 * rate / PEAK:.3g} %)" if bench.args.device == "cuda" else ""
        )
        print(
            f"| {row['anchor']} | {row['mode']} | {row['evaluations']:.3g} | {row['seconds']} | {row['ratio']} | {share} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
