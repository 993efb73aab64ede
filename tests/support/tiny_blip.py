"""A tiny ImageReward in the published file's names, and an evaluation of it in plain float64 torch
that shares nothing with the library."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.support.tiny_clip import _normalised, gelu

SIDE, PATCH, WIDTH, TEXT, LAYERS, CONTEXT = (
    32,
    8,
    128,
    64,
    2,
    35,
)  # heads are 64 wide in both towers: two and one
WIDTHS, PLACES = (1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
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
        state[f"{stem}{place}.weight"] = (
            torch.randn(after, before, generator=generator) * before**-0.5
        )
        state[f"{stem}{place}.bias"] = torch.randn(after, generator=generator) * 0.1
    return state


def chain(state: dict[str, Tensor], x: Tensor, stem: str = "layers.") -> Tensor:
    """The linear chain on (..., width), without activations."""
    for place in PLACES:
        x = x @ state[f"{stem}{place}.weight"].double().T + state[f"{stem}{place}.bias"].double()
    return x[..., 0]


def state_dict(seed: int = 0) -> dict[str, Tensor]:
    """ImageReward's names, with what its file holds besides and nobody reads. Embeddings are small,
    so that a norm's epsilon shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    state = {
        f"{vision}cls_token": normal(1, 1, WIDTH, std=0.003),
        f"{vision}pos_embed": normal(1, (SIDE // PATCH) ** 2 + 1, WIDTH, std=0.003),
        f"{vision}patch_embed.proj.weight": normal(WIDTH, 3, PATCH, PATCH, std=0.001),
        f"{vision}patch_embed.proj.bias": normal(WIDTH, std=0.001),
        f"{text}embeddings.word_embeddings.weight": normal(
            len(VOCABULARY) + 2, TEXT, std=0.003
        ),  # and the [DEC] and [ENC] of BLIP
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
        block, layer = f"{vision}blocks.{i}.", f"{text}encoder.layer.{i}."
        linears |= {f"{block}attn.qkv": (3 * WIDTH, WIDTH), f"{block}attn.proj": (WIDTH, WIDTH)}
        linears |= {f"{block}mlp.fc1": (200, WIDTH), f"{block}mlp.fc2": (WIDTH, 200)}
        norms |= {f"{block}norm1": WIDTH, f"{block}norm2": WIDTH}
        for kind, seen in (("attention", TEXT), ("crossattention", WIDTH)):
            linears |= {
                f"{layer}{kind}.self.query": (TEXT, TEXT),
                f"{layer}{kind}.self.key": (TEXT, seen),
            }
            linears |= {
                f"{layer}{kind}.self.value": (TEXT, seen),
                f"{layer}{kind}.output.dense": (TEXT, TEXT),
            }
            norms |= {f"{layer}{kind}.output.LayerNorm": TEXT}
        linears |= {f"{layer}intermediate.dense": (100, TEXT), f"{layer}output.dense": (TEXT, 100)}
        norms |= {f"{layer}output.LayerNorm": TEXT}
    for name, (rows, columns) in linears.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            normal(rows, columns, std=1.5 * columns**-0.5),
            normal(rows, std=0.3),
        )
    for name, width in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            1 + normal(width, std=0.2),
            normal(width, std=0.2),
        )
    return state | head_state(TEXT, generator, "mlp.layers.")


class Network:
    """ImageReward as its paper and BLIP's draw it, one picture and one text at a time, in float64,
    without padding."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in state.items()}

    def norm(self, x: Tensor, name: str, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred
            / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
            * self.w[f"{name}.weight"]
            + self.w[f"{name}.bias"]
        )

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(Q, C), (K, C), (K, C) -> (Q, C), in heads of 64."""
        heads = [slice(i, i + 64) for i in range(0, query.shape[1], 64)]
        return torch.cat(
            [(query[:, h] @ key[:, h].T / 8).softmax(-1) @ value[:, h] for h in heads], dim=1
        )

    def picture(self, pixels: np.ndarray) -> Tensor:
        stem, grid = "blip.visual_encoder.", SIDE // PATCH
        patches = (
            torch.from_numpy(pixels)
            .reshape(3, grid, PATCH, grid, PATCH)
            .permute(1, 3, 0, 2, 4)
            .reshape(grid * grid, -1)
        )
        x = (
            patches @ self.w[f"{stem}patch_embed.proj.weight"].flatten(1).T
            + self.w[f"{stem}patch_embed.proj.bias"]
        )
        x = torch.cat([self.w[f"{stem}cls_token"][0], x]) + self.w[f"{stem}pos_embed"][0]
        for i in range(LAYERS):
            block = f"{stem}blocks.{i}."
            x = x + self.linear(
                self.attend(
                    *self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(
                        3, 1
                    )
                ),
                f"{block}attn.proj",
            )
            x = x + self.linear(
                gelu(self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")),
                f"{block}mlp.fc2",
            )
        return self.norm(x, f"{stem}norm", 1e-6)

    def reward(self, pixels: np.ndarray, tokens: list[int]) -> float:
        seen, stem = self.picture(pixels), "blip.text_encoder."
        x = (
            self.w[f"{stem}embeddings.word_embeddings.weight"][tokens]
            + self.w[f"{stem}embeddings.position_embeddings.weight"][: len(tokens)]
        )
        x = self.norm(x, f"{stem}embeddings.LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"{stem}encoder.layer.{i}."
            for kind in ("attention", "crossattention"):
                source = x if kind == "attention" else seen
                query, key, value = (
                    self.linear(y, f"{layer}{kind}.self.{n}")
                    for y, n in ((x, "query"), (source, "key"), (source, "value"))
                )
                mixed = self.linear(self.attend(query, key, value), f"{layer}{kind}.output.dense")
                x = self.norm(mixed + x, f"{layer}{kind}.output.LayerNorm", 1e-12)
            hidden = self.linear(
                gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense"
            )
            x = self.norm(hidden + x, f"{layer}output.LayerNorm", 1e-12)
        return (
            float(chain(self.w, x[0], "mlp.layers.")) - 0.16717362830052426
        ) / 1.0333394966054072


def tokens(text: str) -> list[int]:
    """WordPiece, the longest piece first, of a lower-case text without accents; 35 tokens with the
    marks at both ends."""
    ids = []
    text = "".join(
        c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c)
    )  # BERT leaves accents out
    for word in text.replace("'", " ' ").replace("&", " & ").replace(",", " , ").split():
        pieces, rest = [], word
        while rest:
            stem = "##" if pieces else ""
            length = next((n for n in range(len(rest), 0, -1) if stem + rest[:n] in VOCABULARY), 0)
            if not length:
                pieces = ["[UNK]"]
                break
            pieces.append(stem + rest[:length])
            rest = rest[length:]
        ids += [VOCABULARY.index(piece) for piece in pieces]
    return [VOCABULARY.index("[CLS]"), *ids[: CONTEXT - 2], VOCABULARY.index("[SEP]")]


def centred(image: Image.Image) -> np.ndarray:
    """OpenAI's preparation: (3, SIDE, SIDE), normalised. The crop's offset rounds half to even, as
    Python and torchvision do."""
    image = image.convert("RGB")
    width, height = image.size
    size = (
        (SIDE, int(SIDE * height / width))
        if width <= height
        else (int(SIDE * width / height), SIDE)
    )
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 255
    halves = [
        math.floor((n - SIDE) / 2) if (n - SIDE) % 4 < 2 else math.ceil((n - SIDE) / 2)
        for n in pixels.shape[1:]
    ]
    return _normalised(pixels[:, halves[0] : halves[0] + SIDE, halves[1] : halves[1] + SIDE])
