"""Latents and text embeddings, computed once and shared by every run on the same data and base model.

A cache is a folder of safetensors shards named by what it depends on, so that a stale one is never met; each shard is written
whole or not at all, so that an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from deradiff.data.pairs import CaptionedImages, pixels
from deradiff.families import encode_prompts
from deradiff.runs import write_atomic

SHARD = 512  # examples, or captions, of one file
BATCH = 32  # examples, or captions, of one forward


@torch.no_grad()
def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Images (N, 3, R, R) in [-1, 1] to the denoiser's latents: the posterior's mean, shifted and scaled as the base model was trained."""
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor


def weights_digest(modules: list[nn.Module]) -> str:
    """A digest of the modules' weights, whatever folder or revision they came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Cache:
    """Encodings of one data set under one base model. `build` first; then `latents` and `texts` read."""

    def __init__(self, root: Path, pipe: Any, data: CaptionedImages, resolution: int) -> None:
        self.pipe, self.data, self.resolution = pipe, data, resolution
        encoders = [m for k, m in pipe.components.items() if isinstance(m, nn.Module) and (k == "vae" or k.startswith("text_encoder"))]
        key = f"{weights_digest(encoders)}/{pipe.dtype}/{resolution}/{data.fingerprint}/{len(data)}/{'-'.join(data.columns)}"
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.captions = sorted({*data.captions, ""})

    def build(self, rank: int = 0, world: int = 1) -> None:
        """Encode what is missing; of several processes each takes every world-th shard."""
        self._shards("latents", len(self.data), self._encode_latents, rank, world)
        self._shards("texts", len(self.captions), self._encode_texts, rank, world)

    def _shards(self, kind: str, count: int, encode: Callable[[range], dict[str, Tensor]], rank: int, world: int) -> None:
        starts = range(0, count, SHARD)
        missing = [s for s in list(starts)[rank::world] if not self._file(kind, s).is_file()]
        for start in tqdm(missing, desc=f"caching {kind}", unit="shard", disable=rank != 0 or not missing, leave=False):
            rows = range(start, min(start + SHARD, count))
            parts = [encode(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
            whole = {k: torch.cat([p[k] for p in parts]).contiguous().cpu() for k in parts[0]}
            write_atomic(self._file(kind, start), save(whole))

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index // SHARD:06d}.safetensors"

    def _encode_latents(self, rows: range) -> dict[str, Tensor]:
        images = torch.stack([torch.stack([pixels(p, self.resolution) for p in self.data.pictures(i)]) for i in rows])
        return {"latents": encode_images(self.pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])}

    @torch.no_grad()
    def _encode_texts(self, rows: range) -> dict[str, Tensor]:
        return encode_prompts(self.pipe, [self.captions[i] for i in rows])

    @cached_property
    def _open(self) -> dict[str, Any]:
        return {f.name: safe_open(f, "pt") for f in sorted(self.folder.glob("*.safetensors"))}

    @cached_property
    def _place(self) -> dict[str, int]:
        return {caption: i for i, caption in enumerate(self.captions)}

    @cached_property
    def text_keys(self) -> list[str]:
        return list(self._open[self._file("texts", 0).name].keys())

    def latents(self, index: int) -> Tensor:
        """(P, C, H, W): the latents of an example's P pictures."""
        return self._open[self._file("latents", index).name].get_slice("latents")[index % SHARD]

    def texts(self, captions: list[str]) -> dict[str, Tensor]:
        """The rows of `families.encode_prompts` for captions of the data set, or ""."""
        rows = [self._place[c] for c in captions]
        return {k: torch.stack([self._open[self._file("texts", r).name].get_slice(k)[r % SHARD] for r in rows]) for k in self.text_keys}
