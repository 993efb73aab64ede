"""`python -m benchmarks.train`: pairs a second and peak memory of a DPO step, as published and with our savings switched on in turn.

Every variant is a process of its own; they take turns, step by step, so that whatever else the machine does meets all of them alike. The
networks have random weights: only their sizes matter. `--shape sdxl --device cuda` is SDXL's UNet at 1024 px in bf16, with its MFU.
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
from pathlib import Path
from typing import Any

import torch

SAVINGS = {  # each variant is the one before it with one more saving; the published way is `published`
    "split": "published, winner and loser in forwards of their own",
    "published": "published: a second network, encoders in the loop",
    "cache": "+ latents and texts cached",
    "adapter": "+ LoRA without a second network",
    "errors": "+ reference errors known",
    "compile": "+ torch.compile of repeated blocks",
}
PEAK = 790e12  # FLOP/s that an H200 reaches on large bf16 matrix products
PAIRS, CAPTIONS = 16, ("a red circle", "a blue square", "a green cross", "a small yellow star")


def variants(method: str) -> list[str]:
    return [v for v in SAVINGS if v != "adapter" or method == "lora"]


def prepare(folder: Path, shape: str) -> None:
    """A base model of random weights, and pairs of noise pictures."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from benchmarks.random_pipelines import sd_pipeline, sdxl_pipeline, write_noise_pairs
    from deradiff.models.published import AUTOENCODER, DENOISERS

    torch.manual_seed(0)
    if shape == "sdxl":
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            unet, vae = (
                UNet2DConditionModel.from_config(DENOISERS["sdxl"]),
                AutoencoderKL.from_config(AUTOENCODER),
            )
        pipe = sdxl_pipeline(unet.to(torch.bfloat16), vae.to(torch.bfloat16), CAPTIONS)
    else:
        channels = (32, 32, 32) if shape == "small" else (96, 192, 384)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=channels,
            layers_per_block=2,
            cross_attention_dim=256,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        )
        levels = (32,) * 4 if shape == "small" else (32, 64, 128, 128)
        vae = AutoencoderKL(
            block_out_channels=levels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=128,
        )
        pipe = sd_pipeline(unet, vae, CAPTIONS)
    pipe.save_pretrained(folder / "base")
    write_noise_pairs(folder / "pairs.parquet", PAIRS, 1024 if shape == "sdxl" else 128, CAPTIONS)


class Worker:
    """One variant, in the process that is its own."""

    def __init__(self, variant: str, method: str, folder: Path, shape: str, batch: int) -> None:
        from peft import LoraConfig

        from deradiff.anchors.anchor import AnchorCard
        from deradiff.data.cache import Cache
        from deradiff.data.encoders import described_encoders, encoders_key
        from deradiff.data.pairs import Examples, Pairs
        from deradiff.data.reference_errors import ReferenceErrors
        from deradiff.models.base_model import BaseModel
        from deradiff.models.families import family_of
        from deradiff.training.objectives.diffusion import DPO

        self.device, self.batch = torch.device("cuda" if shape == "sdxl" else "cpu"), batch
        self.half = torch.bfloat16 if shape == "sdxl" else None
        base, dtype = str(folder / "base"), self.half or torch.float32
        resolution, data = 1024 if shape == "sdxl" else 128, Pairs(str(folder / "pairs.parquet"))
        wanted = variants(method)[: variants(method).index(variant) + 1]
        cache, parts = None, {}
        if "cache" in wanted:
            cache = Cache(folder / "cache", encoders_key(BaseModel(base)), data, resolution)
            cache.build(
                lambda: BaseModel(base).load_pipeline(dtype, {"unet": None}).to(self.device),
                progress=False,
            )
            parts = described_encoders(BaseModel(base), dtype)
        pipe = BaseModel(base).load_pipeline(dtype, parts)
        family, network = family_of(pipe), pipe.unet.to(self.device)
        self.second = (
            copy.deepcopy(network).requires_grad_(False)
            if "adapter" not in wanted and method == "lora"
            else None
        )
        network.requires_grad_(method == "full")
        if method == "full" and self.half:
            network.float()
        if method == "lora":
            network.add_adapter(
                LoraConfig(
                    r=16,
                    lora_alpha=16,
                    target_modules=list(family.lora_targets),
                    init_lora_weights="gaussian",
                )
            )
            for parameter in network.parameters():
                parameter.data = (
                    parameter.data.float() if parameter.requires_grad else parameter.data
                )
        if shape == "sdxl":
            network.enable_gradient_checkpointing()
        if "compile" in wanted:
            network.compile_repeated_blocks()
        card = AnchorCard(base_model="random", family=family.name, method=method, beta=2000.0)
        errors = ReferenceErrors(folder, f"{method} {batch}") if "errors" in wanted else None
        known = errors is not None and errors.covers(*Examples(data, 0).span(0, PAIRS))
        self.objective = DPO(pipe, resolution, cache, 0.0, card=card, errors=errors, complete=known)
        if self.second is not None:
            self.objective.copy = self.second
        if variant == "split":
            self._split()
        for module in self.objective.frozen:
            module.to(self.device)
        self.places = Examples(data, 0).places(0, PAIRS)
        self.examples, self.network, self.steps = Examples(data, 0), network, 0
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6)

    def _split(self) -> None:
        whole = self.objective.predict
        self.objective.predict = lambda network, noisy, *more: torch.cat(
            [whole(network, part, *more) for part in noisy.split(1)]
        )  # type: ignore[method-assign]

    def step(self) -> None:
        start = self.steps * self.batch % PAIRS
        batch = self.examples.batch(self.objective.collate, self.places[start : start + self.batch])
        batch = {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            loss, _ = self.objective.loss(self.network, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def serve(self, base: float) -> None:
        """A line for a line: how many steps, and then their seconds and the peak memory (bytes) above the bare process's."""
        for line in sys.stdin:
            start = time.perf_counter()
            for _ in range(int(line)):
                self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            print(
                json.dumps(
                    {"seconds": time.perf_counter() - start, "memory": _peak(self.device) - base}
                ),
                flush=True,
            )


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * float(
        next(
            x.split()[1]
            for x in Path("/proc/self/status").read_text().splitlines()
            if x.startswith("VmHWM")
        )
    )


def _process(options: argparse.Namespace) -> float:
    """Bytes of a process that has trained and holds no model: its libraries, a page of which is memory when it is first used."""
    worker = Worker("published", options.method, options.folder / "small", "small", options.batch)
    worker.step()
    del worker
    _forget_peak(torch.device("cpu"))
    return _peak(torch.device("cpu"))


def _forget_peak(device: torch.device) -> None:
    """What was held while loading is given back: a training run is as large as its steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def work(options: argparse.Namespace) -> None:
    import peft  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    import deradiff.training.objectives.diffusion  # noqa: F401

    base = 0.0 if options.shape == "sdxl" else _process(options)
    worker = Worker(options.work, options.method, options.folder, options.shape, options.batch)
    for _ in range(PAIRS // options.batch):  # compiles, fills the errors of a first sitting
        worker.step()
    if worker.objective.errors:
        worker.objective.errors.flush()
    _forget_peak(worker.device)
    print("ready", flush=True)
    worker.serve(base)


def measure(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a step and peak memory of each variant, in turns; one variant at a time holds the GPU's memory there."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.train",
        "--method",
        method,
        "--folder",
        str(options.folder),
    ]
    command += ["--shape", options.shape, "--batch", str(options.batch)]
    subprocess.run(
        [*command, "--work", "errors"], input="", text=True, check=True, stdout=subprocess.DEVNULL
    )  # an earlier run of another beta
    workers = {}
    for name in variants(method):
        workers[name] = subprocess.Popen(
            [*command, "--work", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if workers[name].stdout.readline() != "ready\n":
            raise RuntimeError(f"the variant {name} did not start")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    memory = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            print(1, file=worker.stdin, flush=True)
            told = json.loads(worker.stdout.readline())
            seconds[name].append(told["seconds"])
            memory[name] = told["memory"]
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return [
        {"variant": n, "seconds": statistics.median(seconds[n]), "memory": memory[n]}
        for n in workers
    ]


def table(method: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    base = next(r for r in rows if r["variant"] == "published")
    lines = [
        f"| {method} | pairs/s | x published | peak memory, GB | x published |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        pace, speed, share = (
            options.batch / r["seconds"],
            base["seconds"] / r["seconds"],
            r["memory"] / base["memory"],
        )
        lines.append(
            f"| {SAVINGS[r['variant']]} | {pace:.2f} | {speed:.2f} | {r['memory'] / 1e9:.2f} | {share:.2f} |"
        )
    if options.shape == "sdxl":
        from deradiff.models.flops import denoiser_flops, dpo_step_flops
        from deradiff.models.published import DENOISERS

        forward = denoiser_flops(DENOISERS["sdxl"], 128, 128)
        flops = dpo_step_flops(
            forward, options.batch, method, False, True
        )  # recomputation is no use: it is not counted
        lines.append(
            f"\nMFU of the last row against {PEAK / 1e12:.0f} TFLOP/s: {100 * flops / rows[-1]['seconds'] / PEAK:.1f} %"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=("tiny", "sdxl"), default="tiny", help="sdxl needs a GPU"
    )
    parser.add_argument("--batch", type=int, default=4, help="pairs of a step")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each variant")
    parser.add_argument("--method", choices=("lora", "full"), help="of one worker; both otherwise")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options)
    if PAIRS % options.batch:
        parser.error(f"--batch must divide {PAIRS}")
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        prepare(options.folder, options.shape)
        if options.shape == "tiny":
            prepare(options.folder / "small", "small")
        for method in [options.method] if options.method else ["lora", "full"]:
            print(table(method, measure(method, options), options) + "\n", flush=True)


if __name__ == "__main__":
    main()
