"""Latents and text embeddings, computed once and shared by every run on the same data and base model.

A cache is a folder of safetensors shards named by what it depends on, so that a stale one is never met; each shard is written
whole or not at all, so that an interrupted build goes on where it stopped. Ranks and other runs that build the same cache share the work.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from deradiff.data.locks import Locks
from deradiff.data.pairs import BrokenPicture, CaptionedImages, pixels
from deradiff.files import write_atomic
from deradiff.models.families import family_of

log = logging.getLogger(__name__)
SHARD = 512  # examples, or captions, of one file
BATCH = 32  # examples, or captions, of one forward


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """The latents (N, C, H, W) of images (N, 3, R, R) in [-1, 1], as the family encodes them."""
    return family_of(pipe).encode_images(pipe.vae, images)


def encodings_key(encoders: str, data: CaptionedImages, resolution: int) -> str:
    """All that the encodings of a data set depend on: encoders, tokenizers and precision, which `encoders` tells, resolution, rows."""
    return f"{encoders}/{resolution}/{data.fingerprint}/{'-'.join(data.columns)}"


class Cache:
    """Encodings of one data set under one base model. `build` first; then `latents` and `texts` read.

    encoders: what tells the encoders and their precision from others (`deradiff.data.encoders`). flip: mirrored pictures too.
    """

    def __init__(
        self, root: Path, encoders: str, data: CaptionedImages, resolution: int, flip: bool = False
    ) -> None:
        self.data, self.resolution, self.flip = data, resolution, flip
        self.key = encodings_key(encoders, data, resolution)
        self.folder = (
            root / hashlib.sha256(f"3/{self.key}".encode()).hexdigest()[:16]
        )  # 3: the layout of the files
        self.captions = sorted({*data.captions, ""})

    def build(self, load: Callable[[], Any], progress: bool = True) -> None:
        """Encode what is missing; returns when all of it is there, whoever wrote it. Rows whose pictures are broken are then skipped
        in `data`, which raises ValueError where they are too many. load: gives the pipeline that encodes; not called where all is there."""
        pipe = cache(load)
        for flip in (False, True) if self.flip else (False,):
            self._shards(
                _latents(flip),
                len(self.data),
                partial(self._encode_latents, pipe, flip=flip),
                progress,
            )
        self._shards("texts", len(self.captions), partial(self._encode_texts, pipe), progress)
        for start in range(0, len(self.data), SHARD):
            for offset in (
                self._open[self._file("latents", start).name]
                .get_tensor("broken")
                .nonzero()
                .flatten()
                .tolist()
            ):
                self.data.skip(
                    start + offset,
                    f"row {self.data.rows[start + offset]} of {self.data.source} has a broken picture",
                )

    def _shards(
        self, kind: str, count: int, encode: Callable[[range], dict[str, Tensor]], progress: bool
    ) -> None:
        starts = range(0, count, SHARD)
        missing = [s for s in starts if not _whole(self._file(kind, s))]
        locks = Locks(self.folder / f".{kind}.lock")
        with (
            locks,
            tqdm(
                total=len(missing),
                desc=f"caching {kind}",
                unit="shard",
                disable=not progress or not missing,
                leave=False,
            ) as bar,
        ):
            for number in locks.share([s // SHARD for s in missing]):
                file, start = self._file(kind, number * SHARD), number * SHARD
                if not file.is_file():  # unless another process wrote it meanwhile
                    rows = range(start, min(start + SHARD, count))
                    parts = [encode(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
                    write_atomic(
                        file,
                        save(
                            {
                                k: torch.cat([p[k] for p in parts]).contiguous().cpu()
                                for k in parts[0]
                            }
                        ),
                    )
                bar.update()

    def _file(self, kind: str, index: int) -> Path:
        return self.folder / f"{kind}-{index // SHARD:06d}.safetensors"

    def _encode_latents(
        self, pipe: Callable[[], Any], rows: range, flip: bool
    ) -> dict[str, Tensor]:
        """Latents (N, P, C, H, W), and which of the N are broken: theirs are those of a grey picture, never to be read."""
        images, broken = [], []
        grey = torch.zeros(
            len(self.data.columns) - 1 if "image" in self.data.columns else 2,
            3,
            self.resolution,
            self.resolution,
        )
        for i in rows:
            try:
                images.append(
                    torch.stack([pixels(p, self.resolution, flip) for p in self.data.pictures(i)])
                )
            except BrokenPicture as error:
                self.data.skip(i, str(error))
                images.append(grey)
            broken.append(i in self.data.broken)
        stacked = torch.stack(images)
        latents = encode_images(pipe(), stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
        return {"latents": latents, "broken": torch.tensor(broken)}

    @torch.no_grad()
    def _encode_texts(self, pipe: Callable[[], Any], rows: range) -> dict[str, Tensor]:
        loaded = pipe()
        return family_of(loaded).encode_prompts(loaded, [self.captions[i] for i in rows])

    @cached_property
    def _open(self) -> dict[str, Any]:
        return {f.name: safe_open(f, "pt") for f in sorted(self.folder.glob("*.safetensors"))}

    @cached_property
    def _place(self) -> dict[str, int]:
        return {caption: i for i, caption in enumerate(self.captions)}

    @cached_property
    def text_keys(self) -> list[str]:
        return list(self._open[self._file("texts", 0).name].keys())

    def latents(self, index: int, flip: bool = False) -> Tensor:
        """(P, C, H, W): the latents of an example's P pictures, mirrored where `flip` is set."""
        return self._open[self._file(_latents(flip), index).name].get_slice("latents")[
            index % SHARD
        ]

    def texts(self, captions: list[str]) -> dict[str, Tensor]:
        """The rows of `Family.encode_prompts` for captions of the data set, or ""."""
        rows = [self._place[c] for c in captions]
        return {
            k: torch.stack(
                [self._open[self._file("texts", r).name].get_slice(k)[r % SHARD] for r in rows]
            )
            for k in self.text_keys
        }


def _latents(flip: bool) -> str:
    return "flipped" if flip else "latents"


def _whole(file: Path) -> bool:
    """Whether a shard is there and complete. One that a full disk or a copy tore is told and removed, to be made again."""
    try:
        with safe_open(file, "pt"):  # reads the header, and holds it against the file's length
            return True
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError) as error:
        log.warning("%s is torn (%s), and is made again", file, error)
        file.unlink(missing_ok=True)
        return False
