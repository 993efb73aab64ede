"""`python -m benchmarks.train`: speed and memory of a DPO step, as published and with our savings.

Savings are switched on in turn: each variant is the one before it with one more. Every variant is a
process of its own. They take turns, step by step, so that whatever else the machine does meets all
of them alike. The networks have random weights, because only their sizes matter.

python -m benchmarks.train                     a small UNet on the CPU
python -m benchmarks.train --shape sdxl        SDXL's UNet at 1024 px on a GPU, with its MFU
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

from benchmarks.random_pipelines import (
    PUBLISHED,
    TOKENS,
    TextEncoderSize,
    make_text_encoders,
    pipeline_of,
    random_pipeline,
    write_noise_pairs,
)
from deradiff.anchors.anchor import AnchorCard
from deradiff.data.cache import Cache
from deradiff.data.encoders import encoders_key, encoders_without_weights
from deradiff.data.pairs import Examples, Pairs
from deradiff.data.reference_errors import ReferenceErrors
from deradiff.models.base_model import BaseModel
from deradiff.models.cuda_graphs import enable_gradient_checkpointing
from deradiff.models.families import family_of
from deradiff.models.flops import denoiser_flops, dpo_step_flops
from deradiff.models.gpus import MEASURED_TFLOPS
from deradiff.models.published import DENOISERS
from deradiff.training.objectives.diffusion import DPO
from deradiff.worlds.networks import make_tokenizer

VARIANTS = {
    "split": "published, winner and loser in forwards of their own",
    "published": "published: a second network, encoders in the loop",
    "cache": "+ latents and texts cached",
    "adapter": "+ LoRA without a second network",
    "errors": "+ reference errors known",
    "compile": "+ torch.compile of repeated blocks",
}
METHODS = ("lora", "full")
PEAK = MEASURED_TFLOPS["H200"] * 1e12  # FLOP/s
PAIRS = 16
CAPTIONS = ("a red circle", "a blue square", "a green cross", "a small yellow star")
RANK = 16
BETA = 2000.0


def variants(method: str) -> list[str]:
    """The variants of a method: a full fine-tune has no adapter."""
    return [name for name in VARIANTS if name != "adapter" or method == "lora"]


def small_pipeline(channels: tuple[int, ...], autoencoder_channels: tuple[int, ...]) -> Any:
    """A pipeline of SD1.5's kind for latents of 16 x 16."""
    # Three levels of the denoiser, and an autoencoder that shrinks by 8 as the published one.
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=2,
        cross_attention_dim=256,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    )
    vae = AutoencoderKL(
        block_out_channels=autoencoder_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=128,
    )
    tokenizer = make_tokenizer(list(CAPTIONS), length=TOKENS)
    text_encoders = make_text_encoders([TextEncoderSize(256, 6)], tokenizer)
    return pipeline_of(unet, vae, tokenizer, text_encoders)


def published_sdxl() -> Any:
    """SDXL's networks at their published sizes, in bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return random_pipeline(PUBLISHED["sdxl"], CAPTIONS, 1024, device, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """What is trained, and where.

    Attributes:
        make_pipeline: makes the base model.
        resolution: of the images, in pixels.
        device: where it is trained.
        half: the precision of frozen weights and of autocast; None: float32 everywhere.
        large: with gradient checkpointing, and the model FLOPs utilisation in the table.
    """

    make_pipeline: Callable[[], Any]
    resolution: int = 128
    device: str = "cpu"
    half: torch.dtype | None = None
    large: bool = False


SHAPES = {
    "small": Shape(lambda: small_pipeline((32, 32, 32), (32, 32, 32, 32))),
    "tiny": Shape(lambda: small_pipeline((96, 192, 384), (32, 64, 128, 128))),
    "sdxl": Shape(published_sdxl, 1024, "cuda", torch.bfloat16, large=True),
}
"""`small` is what a process trains to find the memory that its libraries take."""


def prepare(folder: Path, shape: Shape) -> None:
    """Write a base model of random weights, and pairs of noise images."""
    torch.manual_seed(0)
    shape.make_pipeline().save_pretrained(folder / "base")
    write_noise_pairs(folder / "pairs.parquet", PAIRS, shape.resolution, CAPTIONS)


@dataclass(frozen=True)
class Materials:
    """What a variant is made from.

    Attributes:
        folder: of the reference's errors.
        data: the pairs.
        resolution: of the images, in pixels.
        load: makes the base model's pipeline; whether it has its encoders.
        cache: gives the encodings of the data, complete.
        checkpointing: train with gradient checkpointing.
    """

    folder: Path
    data: Pairs
    resolution: int
    load: Callable[[bool], Any]
    cache: Callable[[], Cache]
    checkpointing: bool = False


def saved_materials(folder: Path, shape: Shape) -> Materials:
    """What `prepare` has left in a folder."""
    base = BaseModel(str(folder / "base"))
    data = Pairs(str(folder / "pairs.parquet"))
    dtype = shape.half or torch.float32

    def load(encoders: bool) -> Any:
        return base.load_pipeline(dtype, {} if encoders else encoders_without_weights(base, dtype))

    def encoding_pipeline() -> Any:
        return base.load_pipeline(dtype, {"unet": None}).to(shape.device)

    def cache() -> Cache:
        encodings = Cache(folder / "cache", encoders_key(base), data, shape.resolution)
        encodings.build(encoding_pipeline, progress=False)
        return encodings

    return Materials(folder, data, shape.resolution, load, cache, shape.large)


def make_objective(variant: str, method: str, materials: Materials, pairs: int) -> Any:
    """The objective of one variant, its network ready to train.

    Args:
        variant: a key of VARIANTS. The first time that `errors` is trained the reference's errors
            are not known yet: they are evaluated, and kept.
        method: `lora` or `full`.
        materials: what it is made from.
        pairs: that are trained on.
    """
    names = variants(method)
    savings = names[: names.index(variant) + 1]

    # The base model, without its encoders where the data is encoded.
    cache = materials.cache() if "cache" in savings else None
    pipe = materials.load(cache is None)
    network = pipe.unet

    # The published launcher's second network, and what is trained.
    needs_second = method == "lora" and "adapter" not in savings
    second = copy.deepcopy(network).requires_grad_(False) if needs_second else None
    family = family_of(pipe)
    make_trainable(network, method, family.lora_targets)
    if materials.checkpointing:
        enable_gradient_checkpointing(network)
    if "compile" in savings:
        network.compile_repeated_blocks()

    # The objective, with the reference's errors where they are known.
    examples = Examples(materials.data, 0)
    errors = ReferenceErrors(materials.folder, method) if "errors" in savings else None
    is_known = errors is not None and errors.covers(*examples.span(0, pairs))
    card = AnchorCard(base_model="random", family=family.name, method=method, beta=BETA)
    objective: Any = DPO(
        pipe, materials.resolution, cache, 0.0, card=card, errors=errors, complete=is_known
    )
    if second is not None:
        objective.copy = second
        objective.frozen.append(second)
    if variant == "split":
        _split_forwards(objective)
    return objective


def make_trainable(network: Any, method: str, lora_targets: tuple[str, ...]) -> None:
    """Have all weights trained, or an adapter; what is trained is in float32."""
    network.requires_grad_(method == "full")
    if method == "lora":
        config = LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=list(lora_targets),
            init_lora_weights="gaussian",
        )
        network.add_adapter(config)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _split_forwards(objective: Any) -> None:
    """Evaluate winner and loser one after the other."""
    whole = objective.predict

    def predict(network: Any, noisy: Any, *more: Any) -> Any:
        return torch.cat([whole(network, part, *more) for part in noisy.split(1)])

    objective.predict = predict


class Worker:
    """One variant, in the process that is its own.

    Args:
        variant: a key of VARIANTS.
        method: `lora` or `full`.
        folder: of `prepare`.
        shape: what is trained.
        batch: pairs of a step.
    """

    def __init__(self, variant: str, method: str, folder: Path, shape: Shape, batch: int) -> None:
        self.device = torch.device(shape.device)
        self.half = shape.half
        self.batch = batch
        self.steps = 0
        materials = saved_materials(folder, shape)
        self.examples = Examples(materials.data, 0)
        self.epoch_indices = self.examples.epoch_indices(0, PAIRS)
        self.objective = make_objective(variant, method, materials, PAIRS)
        self.network = self.objective.network.to(self.device)
        for module in self.objective.frozen:
            module.to(self.device)
        self.trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def step(self) -> None:
        """One optimiser step."""
        # The next pairs, on the device.
        start = self.steps * self.batch % PAIRS
        epoch_indices = self.epoch_indices[start : start + self.batch]
        batch = self.examples.batch(self.objective.collate, epoch_indices)
        for key, value in batch.items():
            if torch.is_tensor(value):
                batch[key] = value.to(self.device)

        # Forward, backward, and the optimiser.
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            loss, _ = self.objective.loss(self.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def serve(self, base: float) -> None:
        """Answer each line of the standard input with a line.

        A line asks for a number of steps. The answer has their seconds and the peak memory.

        Args:
            base: bytes of the process without a model, which are subtracted.
        """
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            answer = {"seconds": seconds, "memory": peak_memory(self.device) - base}
            print(json.dumps(answer), flush=True)


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has held since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return 1024 * float(peak.split()[1])


def forget_peak(device: torch.device) -> None:
    """Give back what was held while loading: a training run is as large as its steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def memory_without_model(options: argparse.Namespace) -> float:
    """Bytes of a process that has trained and holds no model: those of its libraries.

    A page of a library is memory once it is used, so that a small model is trained first.
    """
    folder = options.folder / "small"
    worker = Worker("published", options.method, folder, SHAPES["small"], options.batch)
    worker.step()
    del worker
    forget_peak(torch.device("cpu"))
    return peak_memory(torch.device("cpu"))


def work(options: argparse.Namespace) -> None:
    """The process of a variant."""
    shape = SHAPES[options.shape]
    base = memory_without_model(options) if shape.device == "cpu" else 0.0
    worker = Worker(options.work, options.method, options.folder, shape, options.batch)

    # The first epoch compiles, and fills the store of the reference's errors.
    for _ in range(PAIRS // options.batch):
        worker.step()
    if worker.objective.errors:
        worker.objective.errors.flush()
    forget_peak(worker.device)
    print("ready", flush=True)
    worker.serve(base)


def measure(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a step and peak memory of each variant."""
    command = [sys.executable, "-m", "benchmarks.train", "--method", method]
    command += ["--folder", str(options.folder), "--shape", options.shape]
    command += ["--batch", str(options.batch)]

    # An earlier run, of another beta, leaves the reference's errors behind.
    first = [*command, "--work", "errors"]
    subprocess.run(first, input="", text=True, check=True, stdout=subprocess.DEVNULL)

    workers: dict[str, Any] = {}
    for name in variants(method):
        workers[name] = subprocess.Popen(
            [*command, "--work", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if workers[name].stdout.readline() != "ready\n":
            raise RuntimeError(f"the variant {name} did not start")

    # One step of each in turn.
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            print(1, file=worker.stdin, flush=True)
            answer = json.loads(worker.stdout.readline())
            seconds[name].append(answer["seconds"])
            memory[name] = answer["memory"]

    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    rows = []
    for name in workers:
        median = statistics.median(seconds[name])
        rows.append({"variant": name, "seconds": median, "memory": memory[name]})
    return rows


def table(method: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows of `measure` as a markdown table, beside the published way."""
    # A row for each variant.
    published = next(row for row in rows if row["variant"] == "published")
    lines = [
        f"| {method} | pairs/s | x published | peak memory, GB | x published |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        pace = options.batch / row["seconds"]
        speed = published["seconds"] / row["seconds"]
        gigabytes = row["memory"] / 1e9
        share = row["memory"] / published["memory"]
        name = VARIANTS[row["variant"]]
        lines.append(f"| {name} | {pace:.2f} | {speed:.2f} | {gigabytes:.2f} | {share:.2f} |")

    # How much of the GPU the last variant uses.
    if SHAPES[options.shape].large:
        mfu = flops_of_a_step(method, options.batch) / rows[-1]["seconds"] / PEAK
        lines.append(f"\nMFU of the last row against {PEAK / 1e12:.0f} TFLOP/s: {100 * mfu:.1f} %")
    return "\n".join(lines)


def flops_of_a_step(method: str, pairs: int) -> float:
    """FLOPs of SDXL's step with known reference errors. Recomputation is no use: not counted."""
    config = DENOISERS["sdxl"]
    forward = denoiser_flops(config, config["sample_size"], config["sample_size"])
    return dpo_step_flops(forward, pairs, method, stored_reference=True)


def main() -> None:
    """Measure and print a table for each method; with --work, be the process of a variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=("tiny", "sdxl"), default="tiny", help="sdxl needs a GPU"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each variant")
    parser.add_argument("--method", choices=METHODS, help="both, if not given")
    # For the process of a variant.
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    if PAIRS % options.batch:
        parser.error(f"--batch must divide {PAIRS}")

    # One base model and one data set for all variants; a table for each method.
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        prepare(options.folder, SHAPES[options.shape])
        if SHAPES[options.shape].device == "cpu":
            prepare(options.folder / "small", SHAPES["small"])
        for method in [options.method] if options.method else METHODS:
            print(table(method, measure(method, options), options) + "\n", flush=True)


if __name__ == "__main__":
    main()
