"""A tiny ImageReward in the published file's names, and an independent evaluation of it.

The evaluation is plain float64 torch and shares nothing with the library.
"""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.support.tiny_clip import gelu, normalise

SIDE = 32
PATCH = 8
LAYERS = 2
CONTEXT = 35

# Widths of the image and the text tower; heads are 64 wide in both: two and one.
WIDTH = 128
TEXT = 64

# The linear chain: what each layer gives, and its place in the published Sequential.
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    *SPECIAL,
    *LETTERS,
    *(f"##{c}" for c in LETTERS),
    *"0123456789'&,.",
    "fox",
    "red",
    "##es",
    "snow",
]


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def head_state(width: int, generator: torch.Generator, stem: str = "layers.") -> dict[str, Tensor]:
    """The linear chain, at weights that keep its output of order 1."""
    state = {}
    for place, before, after in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False):
        weight = torch.randn(after, before, generator=generator)
        state[f"{stem}{place}.weight"] = weight * before**-0.5
        state[f"{stem}{place}.bias"] = torch.randn(after, generator=generator) * 0.1
    return state


def chain(state: dict[str, Tensor], x: Tensor, stem: str = "layers.") -> Tensor:
    """The linear chain on (..., width), without activations."""
    for place in PLACES:
        x = x @ state[f"{stem}{place}.weight"].double().T + state[f"{stem}{place}.bias"].double()
    return x[..., 0]


def state_dict(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under ImageReward's names, with what its file holds besides and nobody reads.

    Embeddings are small, so that a norm's epsilon shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    vision = "blip.visual_encoder."
    text = "blip.text_encoder."
    vocabulary = len(VOCABULARY) + 2  # and the [DEC] and [ENC] of BLIP
    state = {
        f"{vision}cls_token": normal(1, 1, WIDTH, std=0.003),
        f"{vision}pos_embed": normal(1, (SIDE // PATCH) ** 2 + 1, WIDTH, std=0.003),
        f"{vision}patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH, std=0.001),
        f"{vision}patch_embed.proj.bias": normal(WIDTH, std=0.001),
        f"{text}embeddings.word_embeddings.weight": normal(vocabulary, TEXT, std=0.003),
        f"{text}embeddings.position_embeddings.weight": normal(64, TEXT, std=0.003),
        f"{text}embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": normal(16, WIDTH, std=1),
        "blip.vision_proj.bias": normal(16, std=1),
        "blip.text_proj.weight": normal(16, TEXT, std=1),
        "blip.text_proj.bias": normal(16, std=1),
    }
    linears: dict[str, tuple[int, int]] = {}
    norms = {f"{vision}norm": WIDTH, f"{text}embeddings.LayerNorm": TEXT}
    for i in range(LAYERS):
        block = f"{vision}blocks.{i}."
        layer = f"{text}encoder.layer.{i}."
        linears |= {f"{block}attn.qkv": (3 * WIDTH, WIDTH), f"{block}attn.proj": (WIDTH, WIDTH)}
        linears |= {f"{block}mlp.fc1": (200, WIDTH), f"{block}mlp.fc2": (WIDTH, 200)}
        norms |= {f"{block}norm1": WIDTH, f"{block}norm2": WIDTH}
        for kind, source_width in (("attention", TEXT), ("crossattention", WIDTH)):
            linears[f"{layer}{kind}.self.query"] = (TEXT, TEXT)
            linears[f"{layer}{kind}.self.key"] = (TEXT, source_width)
            linears[f"{layer}{kind}.self.value"] = (TEXT, source_width)
            linears[f"{layer}{kind}.output.dense"] = (TEXT, TEXT)
            norms[f"{layer}{kind}.output.LayerNorm"] = TEXT
        linears |= {f"{layer}intermediate.dense": (100, TEXT), f"{layer}output.dense": (TEXT, 100)}
        norms |= {f"{layer}output.LayerNorm": TEXT}
    for name, (rows, columns) in linears.items():
        state[f"{name}.weight"] = normal(rows, columns, std=1.5 * columns**-0.5)
        state[f"{name}.bias"] = normal(rows, std=0.3)
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + normal(width, std=0.2)
        state[f"{name}.bias"] = normal(width, std=0.2)
    return state | head_state(TEXT, generator, "mlp.layers.")


class Network:
    """ImageReward as its paper and BLIP's draw it, in float64.

    One image and one text at a time, without padding.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in state.items()}

    def norm(self, x: Tensor, name: str, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return centred / deviation * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(Q, C), (K, C), (K, C) -> (Q, C), in heads of 64."""
        parts = []
        for start in range(0, query.shape[1], 64):
            head = slice(start, start + 64)
            weights = (query[:, head] @ key[:, head].T / 8).softmax(-1)
            parts.append(weights @ value[:, head])
        return torch.cat(parts, dim=1)

    def image(self, pixels: np.ndarray) -> Tensor:
        """Features of (3, SIDE, SIDE) normalised pixels: a row for each patch and one more."""
        stem = "blip.visual_encoder."
        grid = SIDE // PATCH
        squares = torch.from_numpy(pixels).reshape(3, grid, PATCH, grid, PATCH)
        patches = squares.permute(1, 3, 0, 2, 4).reshape(grid * grid, -1)
        kernel = self.w[f"{stem}patch_embed.proj.weight"].flatten(1).T
        x = patches @ kernel + self.w[f"{stem}patch_embed.proj.bias"]
        x = torch.cat([self.w[f"{stem}cls_token"][0], x]) + self.w[f"{stem}pos_embed"][0]
        for i in range(LAYERS):
            block = f"{stem}blocks.{i}."
            normed = self.norm(x, f"{block}norm1", 1e-6)
            query, key, value = self.linear(normed, f"{block}attn.qkv").chunk(3, 1)
            x = x + self.linear(self.attend(query, key, value), f"{block}attn.proj")
            normed = self.norm(x, f"{block}norm2", 1e-6)
            hidden = gelu(self.linear(normed, f"{block}mlp.fc1"))
            x = x + self.linear(hidden, f"{block}mlp.fc2")
        return self.norm(x, f"{stem}norm", 1e-6)

    def reward(self, pixels: np.ndarray, tokens: list[int]) -> float:
        """The standardised reward of (3, SIDE, SIDE) normalised pixels for a text."""
        image = self.image(pixels)
        stem = "blip.text_encoder."
        words = self.w[f"{stem}embeddings.word_embeddings.weight"][tokens]
        positions = self.w[f"{stem}embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(words + positions, f"{stem}embeddings.LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"{stem}encoder.layer.{i}."
            for kind in ("attention", "crossattention"):
                source = x if kind == "attention" else image
                query = self.linear(x, f"{layer}{kind}.self.query")
                key = self.linear(source, f"{layer}{kind}.self.key")
                value = self.linear(source, f"{layer}{kind}.self.value")
                mixed = self.linear(self.attend(query, key, value), f"{layer}{kind}.output.dense")
                x = self.norm(mixed + x, f"{layer}{kind}.output.LayerNorm", 1e-12)
            hidden = gelu(self.linear(x, f"{layer}intermediate.dense"))
            output = self.linear(hidden, f"{layer}output.dense")
            x = self.norm(output + x, f"{layer}output.LayerNorm", 1e-12)
        reward = float(chain(self.w, x[0], "mlp.layers."))
        return (reward - 0.16717362830052426) / 1.0333394966054072


def tokens(text: str) -> list[int]:
    """WordPiece tokens of a text: at most 35, with the marks at both ends."""
    # Lower case, without accents, punctuation apart.
    decomposed = unicodedata.normalize("NFD", text.lower())
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    for mark in "'&,":
        plain = plain.replace(mark, f" {mark} ")

    ids = []
    for word in plain.split():
        ids += [VOCABULARY.index(piece) for piece in _pieces(word)]
    return [VOCABULARY.index("[CLS]"), *ids[: CONTEXT - 2], VOCABULARY.index("[SEP]")]


def _pieces(word: str) -> list[str]:
    """The pieces of a word, the longest that fits first."""
    pieces: list[str] = []
    rest = word
    while rest:
        stem = "##" if pieces else ""
        lengths = range(len(rest), 0, -1)
        length = next((n for n in lengths if stem + rest[:n] in VOCABULARY), 0)
        if not length:
            return ["[UNK]"]
        pieces.append(stem + rest[:length])
        rest = rest[length:]
    return pieces


def centred(image: Image.Image) -> np.ndarray:
    """OpenAI's preparation: (3, SIDE, SIDE), normalised."""
    width = max(SIDE, int(SIDE * image.width / image.height))
    height = max(SIDE, int(SIDE * image.height / image.width))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).transpose(2, 0, 1) / 255
    top = _half_to_even(height - SIDE)
    left = _half_to_even(width - SIDE)
    return normalise(pixels[:, top : top + SIDE, left : left + SIDE])


def _half_to_even(number: int) -> int:
    """Half of a number; a half is rounded to an even number, as Python and torchvision do."""
    return math.floor(number / 2) if number % 4 < 2 else math.ceil(number / 2)
