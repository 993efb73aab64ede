"""Latents and text embeddings, computed once for all runs on the same data and base model.

A cache is a folder of safetensors files, its shards. The folder's name is a digest of all that the
encodings depend on, so encodings are never read for other data or other encoders. A shard is
written completely or not at all, so an interrupted build continues where it stopped. Ranks, and
runs that build the same cache, share the work. Each row has a checksum, which is checked whenever
the row is read.

Shapes: N examples of a shard, P images of an example (pairs: 2, the winner first), latents of C
channels, H rows and W columns; R pixels of an image's side.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deradiff.data.pairs import BrokenImage, CaptionedImages, EncodedImages, image_tensor
from deradiff.data.part_files import Advance, PartFiles
from deradiff.files import write_atomic
from deradiff.models.autoencoders import encoding_precision
from deradiff.models.families import family_of

log = logging.getLogger(__name__)

SHARD = 512
"""Examples, or captions, of one file."""

BATCH = 32
"""Examples, or captions, that are encoded at once, at most."""

BYTES_AT_ONCE = 16 * 2**20
"""Of one channel of all images that the autoencoder encodes at once.

Its memory grows with it: 13 GB for SDXL's in half precision, at 8 images of 1024 pixels. More of
them are not faster (docs/training.md).
"""

BATCHES_AHEAD = 2
"""Batches of images that are decoded while the autoencoder works."""

LAYOUT = 4
"""Version of the files' layout, and of how images are decoded."""

LATENTS = "latents"
FLIPPED_LATENTS = "flipped"
EMBEDDINGS = "texts"
"""The kinds of shards; their files are named `<kind>-<number>.safetensors`."""

CHECKSUMS = ".crc32"
"""How the name of a tensor ends that holds a checksum of each row of another."""

Encode = Callable[[range, Advance], dict[str, Tensor]]
"""From numbers of examples, or of captions, to tensors with a row for each."""


class NotFiniteError(ValueError):
    """An autoencoder gave NaN or infinite latents."""


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """The latents (N, C, H, W) of images, as the pipeline's family encodes them.

    So many images are encoded at once as memory allows. An autoencoder that overflows in float16
    encodes in float32.

    Args:
        pipe: a pipeline with an autoencoder.
        images: (N, 3, R, R) in [-1, 1].
    """
    family = family_of(pipe)
    dtype = pipe.vae.dtype
    with encoding_precision(pipe.vae):
        count = images_at_once(images.shape[-1], pipe.vae.dtype)
        latents = [family.encode_images(pipe.vae, part) for part in images.split(count)]
    return torch.cat(latents).to(dtype)


def images_at_once(resolution: int, dtype: torch.dtype) -> int:
    """How many images an autoencoder encodes at once.

    Args:
        resolution: pixels of an image's side.
        dtype: of the autoencoder.
    """
    return max(1, BYTES_AT_ONCE // (resolution**2 * dtype.itemsize))


def examples_at_once(resolution: int, dtype: torch.dtype, images: int) -> int:
    """How many examples are encoded at once while a cache is built.

    Args:
        resolution: pixels of an image's side.
        dtype: of the autoencoder.
        images: of an example.
    """
    return min(BATCH, max(1, images_at_once(resolution, dtype) // images))


def encodings_key(encoders: str, data: CaptionedImages, resolution: int) -> str:
    """A text that names all that the encodings of a data set depend on.

    Args:
        encoders: names the encoders, the tokenizers and their precision.
        data: the examples.
        resolution: pixels of an image's side.
    """
    return f"{encoders}/{resolution}/{data.fingerprint}/{'-'.join(data.columns)}"


class Cache:
    """Encodings of one data set by one set of encoders. `build` it, then read.

    Args:
        root: folder of all caches.
        encoders: a text that names the encoders and their precision; see
            `deradiff.data.encoders.encoders_key`.
        data: the examples.
        resolution: pixels of an image's side.
        flip: encode the mirrored images, too.

    Attributes:
        key: a text that names all that the encodings depend on.
        folder: of this cache.
        captions: the distinct captions, and "", in the order of their embeddings.
    """

    def __init__(
        self, root: Path, encoders: str, data: CaptionedImages, resolution: int, flip: bool = False
    ) -> None:
        self.data = data
        self.resolution = resolution
        self.flip = flip
        self.key = encodings_key(encoders, data, resolution)
        name = hashlib.sha256(f"{LAYOUT}/{self.key}".encode()).hexdigest()[:16]
        self.folder = root / name
        self.captions = sorted({*data.captions, ""})

    # Building

    def build(self, load: Callable[[], Any], progress: bool = True) -> None:
        """Encode what is missing; return when the cache is complete, whoever wrote it.

        Examples whose images are broken are skipped in `data` from then on.

        Args:
            load: makes the pipeline that encodes; not called where nothing is missing.
            progress: show progress bars.

        Raises:
            ValueError: where too many images are broken; see `CaptionedImages.skip`.
            NotFiniteError: where the autoencoder gives latents that are not finite; they are not
                written.
        """
        # The pipeline is loaded by whichever shard is the first to need it, and once.
        pipe = functools.cache(load)
        for flip in [False, True] if self.flip else [False]:
            encode = partial(self._encode_latents, pipe, flip)
            unit = "pair" if self.data.images_per_example == 2 else "image"
            self._build_shards(_latents_kind(flip), len(self.data), unit, encode, progress)
        encode = partial(self._encode_captions, pipe)
        self._build_shards(EMBEDDINGS, len(self.captions), "caption", encode, progress)
        self._skip_broken()

    def _build_shards(
        self, kind: str, count: int, unit: str, encode: Encode, progress: bool
    ) -> None:
        def write(rows: range, file: Path, advance: Advance) -> None:
            encoded = encode(rows, advance)
            tensors = {name: part.contiguous().cpu() for name, part in encoded.items()}
            for name, part in list(tensors.items()):
                checksums = [_checksum(value, file, row) for row, value in enumerate(part)]
                tensors[name + CHECKSUMS] = torch.tensor(checksums)
            write_atomic(file, save(tensors))

        self._shards(kind, count).write_missing(
            write, f"caching {kind}", unit=unit, progress=progress, is_complete=_is_complete
        )

    def _skip_broken(self) -> None:
        """Skip the examples that the shards mark as broken."""
        for number in self._shards(LATENTS, len(self.data)).numbers:
            start = number * SHARD
            for index in range(start, min(start + SHARD, len(self.data))):
                if self._row(LATENTS, index, "broken"):
                    reason = f"row {self.data.rows[index]} of {self.data.path} has a broken image"
                    self.data.skip(index, reason)

    def _encode_latents(
        self, pipe: Callable[[], Any], flip: bool, rows: range, advance: Advance
    ) -> dict[str, Tensor]:
        """Latents (N, P, C, H, W) of a shard, and which of its N examples are broken.

        The latents of a broken example are those of grey images, and never read.
        """
        images = self.data.images_per_example
        with encoding_precision(pipe().vae):
            size = examples_at_once(self.resolution, pipe().vae.dtype, images)
        batches = []
        for examples in _batches(self._decoded_ahead(rows, flip, BATCHES_AHEAD * size), size):
            stacked = torch.stack(examples)
            latents = encode_images(pipe(), stacked.flatten(0, 1))
            _check_finite(latents, pipe().vae)
            batches.append(latents.unflatten(0, stacked.shape[:2]).cpu())
            advance(len(examples))
        is_broken = [index in self.data.broken for index in rows]
        return {"latents": torch.cat(batches), "broken": torch.tensor(is_broken)}

    def _decoded_ahead(self, rows: range, flip: bool, ahead: int) -> Iterator[Tensor]:
        """The images (P, 3, R, R) of examples, decoded by threads before they are asked for.

        Args:
            rows: numbers of the examples.
            flip: mirror the images.
            ahead: at most so many examples are decoded and wait.
        """
        grey = torch.zeros(self.data.images_per_example, 3, self.resolution, self.resolution)
        waiting: deque[tuple[int, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            left = iter(rows)
            while True:
                # Files are read by this thread alone.
                for index in islice(left, ahead - len(waiting)):
                    encoded = self.data.encoded_images(index)
                    waiting.append((index, threads.submit(self._decode, index, encoded, flip)))
                if not waiting:
                    return
                index, images = waiting.popleft()
                try:
                    yield images.result()
                except BrokenImage as broken:
                    self.data.skip(index, str(broken))
                    yield grey

    def _decode(self, index: int, encoded: EncodedImages, flip: bool) -> Tensor:
        """The images (P, 3, R, R) of an example. Raises BrokenImage."""
        images = self.data.decode(index, encoded)
        return torch.stack([image_tensor(image, self.resolution, flip) for image in images])

    @torch.no_grad()
    def _encode_captions(
        self, pipe: Callable[[], Any], rows: range, advance: Advance
    ) -> dict[str, Tensor]:
        """The text embeddings of a shard's captions."""
        batches = []
        for start in range(0, len(rows), BATCH):
            captions = [self.captions[number] for number in rows[start : start + BATCH]]
            batches.append(family_of(pipe()).encode_prompts(pipe(), captions))
            advance(len(captions))
        embeddings = {}
        for name in batches[0]:
            embeddings[name] = torch.cat([batch[name] for batch in batches])
        return embeddings

    # Reading

    def latents(self, index: int, flip: bool = False) -> Tensor:
        """The latents (P, C, H, W) of an example's images.

        Args:
            index: number of the example.
            flip: those of the mirrored images.

        Raises:
            ValueError: where they are not what was written.
        """
        return self._row(_latents_kind(flip), index, "latents")

    def embeddings(self, captions: list[str]) -> dict[str, Tensor]:
        """The text embeddings of captions, as `Family.encode_prompts` gives them.

        Args:
            captions: of the data set, or "".

        Raises:
            ValueError: where they are not what was written.
        """
        numbers = [self._caption_numbers[caption] for caption in captions]
        embeddings = {}
        for name in self._embedding_names:
            rows = [self._row(EMBEDDINGS, number, name) for number in numbers]
            embeddings[name] = torch.stack(rows)
        return embeddings

    @cached_property
    def _caption_numbers(self) -> dict[str, int]:
        return {caption: number for number, caption in enumerate(self.captions)}

    @cached_property
    def _embedding_names(self) -> list[str]:
        names = self._shard(EMBEDDINGS, 0).keys()
        return [name for name in names if not name.endswith(CHECKSUMS)]

    def _row(self, kind: str, index: int, name: str) -> Tensor:
        """One tensor of an example or a caption, checked against its checksum.

        Raises:
            ValueError: where it is not what was written. The shard is removed, so that the next
                build makes it again.
        """
        number, row = divmod(index, SHARD)
        file = self._file(kind, number)
        try:
            shard = self._shard(kind, number)
            value = shard.get_slice(name)[row]
            is_whole = int(shard.get_slice(name + CHECKSUMS)[row]) == _checksum(value, file, row)
        except (SafetensorError, KeyError, IndexError, RuntimeError):
            is_whole = False
        if not is_whole:
            file.unlink(missing_ok=True)
            raise ValueError(
                f"{file} is not what was written (row {row}, {name}), and has been removed: the "
                "same command makes it again and goes on"
            )
        return value

    # Shards

    def _shards(self, kind: str, count: int) -> PartFiles:
        """The shards of one kind, which hold `count` examples or captions."""
        return PartFiles(self.folder / f".{kind}.lock", partial(self._file, kind), count, SHARD)

    def _file(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:06d}.safetensors"

    def _shard(self, kind: str, number: int) -> Any:
        """A shard of the complete cache, open."""
        return self._open_shards[self._file(kind, number).name]

    @cached_property
    def _open_shards(self) -> dict[str, Any]:
        files = sorted(self.folder.glob("*.safetensors"))
        return {file.name: safe_open(file, "pt") for file in files}


def _checksum(value: Tensor, file: Path, row: int) -> int:
    """CRC-32 of one row of a tensor; a row of another place, shape or kind has another one."""
    text = f"{file.parent.name}/{file.name}/{row}/{value.dtype}/{tuple(value.shape)}"
    data: Any = value.contiguous().flatten().view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(text.encode()))


def _latents_kind(flip: bool) -> str:
    return FLIPPED_LATENTS if flip else LATENTS


def _check_finite(latents: Tensor, vae: Any) -> None:
    """Raises NotFiniteError for latents that no run could learn from."""
    if bool(torch.isfinite(latents).all()):
        return
    precision = str(vae.dtype).removeprefix("torch.")
    source = vae.config.get("_name_or_path") or type(vae).__name__
    remedy = "its weights are damaged, so fetch it again or take another one"
    if vae.dtype == torch.float16:
        remedy = (
            "compute in bfloat16, or take an autoencoder that is made for float16, such as "
            "madebyollin/sdxl-vae-fp16-fix for SDXL"
        )
    raise NotFiniteError(
        f"the autoencoder {source} gives latents in {precision} that are not finite, and they are "
        f"not cached: {remedy}"
    )


def _batches(items: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of so many items; the last one may have fewer."""
    while batch := list(islice(items, size)):
        yield batch


def _is_complete(file: Path) -> bool:
    """Whether a shard exists and is complete.

    One that a full disk or a copy has cut is named in the log and removed; it is made again.
    """
    try:
        # Opening reads the header, and compares it with the file's length.
        with safe_open(file, "pt"):
            return True
    except FileNotFoundError:
        return False
    except (SafetensorError, OSError) as error:
        log.warning("%s is incomplete (%s), and is made again", file, error)
        file.unlink(missing_ok=True)
        return False
