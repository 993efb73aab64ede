"""Tiny CLIP checkpoints in the published layouts, and an independent evaluation of them.

The evaluation shares nothing with the library: the network is written in plain float64 torch over
open_clip's own names, the resampling as matrices, the tokenizer as a regular expression.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from tests.support.tiny_pipelines import tiny_tokenizer

SIDE = 32
PATCH = 8
CONTEXT = 24
WIDTH = {"visual.": 48, "": 32}
HEADS = {"visual.": 6, "": 4}  # the image tower's head_width is 8, not open_clip's default 64
LAYERS = 2
EMBED = 20
VOCABULARY = 514
MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {
        "image_size": SIDE,
        "layers": LAYERS,
        "width": 48,
        "head_width": 8,
        "patch_size": PATCH,
        "mlp_ratio": 3.0,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 4,
        "layers": LAYERS,
    },
}
HIDDEN = {"visual.": 144, "": 128}
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def open_clip_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under open_clip's names.

    They are large enough that activations, norms and padding all show in a score.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    state = {
        "visual.conv1.weight": normal(48, 3, PATCH, PATCH, std=0.1),
        "visual.class_embedding": normal(48, std=1),
        "visual.positional_embedding": normal((SIDE // PATCH) ** 2 + 1, 48, std=1),
        "visual.proj": normal(48, EMBED, std=0.3),
        "token_embedding.weight": normal(VOCABULARY, 32, std=1),
        "positional_embedding": normal(CONTEXT, 32, std=1),
        "text_projection": normal(32, EMBED, std=0.3),
        "logit_scale": torch.tensor(3.1),
    }
    norms = {"visual.ln_pre": 48, "visual.ln_post": 48, "ln_final": 32}
    for tower, width in WIDTH.items():
        for i in range(LAYERS):
            block = f"{tower}transformer.resblocks.{i}."
            linears = {"attn.in_proj_": (3 * width, width), "attn.out_proj.": (width, width)}
            linears |= {"mlp.c_fc.": (HIDDEN[tower], width), "mlp.c_proj.": (width, HIDDEN[tower])}
            for name, (rows, columns) in linears.items():
                state[f"{block}{name}weight"] = normal(rows, columns, std=1.5 * columns**-0.5)
                state[f"{block}{name}bias"] = normal(rows, std=0.3)
            norms |= {f"{block}ln_1": width, f"{block}ln_2": width}
    for name, width in norms.items():
        state[f"{name}.weight"] = 1 + normal(width, std=0.2)
        state[f"{name}.bias"] = normal(width, std=0.2)
    return state


def write_state(path: Path, state: dict[str, Tensor], wrapped: bool = True) -> Path:
    torch.save({"epoch": 3, "state_dict": state} if wrapped else state, path)
    return path


def write_tokenizer(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config))
    return path


def huggingface_model(
    seed: int = 0, activation: str = "gelu", eos_token_id: int = 513
) -> CLIPModel:
    """A CLIPModel of the sizes above, its weights drawn afresh so that they are not small."""
    towers = {"num_hidden_layers": LAYERS, "hidden_act": activation}
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=144,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=PATCH,
        **towers,
    )
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        bos_token_id=512,
        eos_token_id=eos_token_id,
        pad_token_id=513,
        **towers,
    )
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBED)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.ndim:
                continue
            scale = 0.2
            if "embedding" in name:
                scale = 1.0
            elif weight.ndim > 1:
                scale = 1.5 * weight[0].numel() ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                weight += 1
        model.logit_scale.fill_(3.4)
    return model


def write_huggingface(
    folder: Path, model: CLIPModel, tokenizer: bool = True, processor: bool = True
) -> Path:
    """A CLIPModel folder, as transformers saves it.

    Args:
        folder: to write.
        model: a CLIPModel.
        tokenizer: write a tokenizer, too.
        processor: write an image processor, too.
    """
    model.save_pretrained(folder)
    if tokenizer:
        write_tokenizer(folder)
    if processor:
        CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ).save_pretrained(folder)
    return folder


def under_open_clip_names(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIPModel's weights under open_clip's names, for the evaluation below.

    The opposite way of what the library converts.
    """
    held = model.state_dict()
    state = {
        "visual.conv1.weight": held["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": held["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": held["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": held["visual_projection.weight"].T,
        "token_embedding.weight": held["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": held["text_model.embeddings.position_embedding.weight"],
        "text_projection": held["text_projection.weight"].T,
        "logit_scale": held["logit_scale"],
    }
    for kind in ("weight", "bias"):
        state[f"visual.ln_pre.{kind}"] = held[f"vision_model.pre_layrnorm.{kind}"]
        state[f"visual.ln_post.{kind}"] = held[f"vision_model.post_layernorm.{kind}"]
        state[f"ln_final.{kind}"] = held[f"text_model.final_layer_norm.{kind}"]
        for tower, theirs in (("visual.", "vision_model"), ("", "text_model")):
            for i in range(LAYERS):
                block = f"{tower}transformer.resblocks.{i}."
                layer = f"{theirs}.encoder.layers.{i}."
                projections = [held[f"{layer}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                state[f"{block}attn.in_proj_{kind}"] = torch.cat(projections)
                state[f"{block}attn.out_proj.{kind}"] = held[f"{layer}self_attn.out_proj.{kind}"]
                state[f"{block}mlp.c_fc.{kind}"] = held[f"{layer}mlp.fc1.{kind}"]
                state[f"{block}mlp.c_proj.{kind}"] = held[f"{layer}mlp.fc2.{kind}"]
                state[f"{block}ln_1.{kind}"] = held[f"{layer}layer_norm1.{kind}"]
                state[f"{block}ln_2.{kind}"] = held[f"{layer}layer_norm2.{kind}"]
    return state


# The network


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def quick_gelu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


class Network:
    """open_clip's CLIP as its paper draws it, one sequence at a time, in float64."""

    def __init__(self, state: dict[str, Tensor], activation: Any = gelu) -> None:
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.activation = activation

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: Tensor, weight: str, bias: str) -> Tensor:
        return x @ self.w[weight].T + self.w[bias]

    def attention(self, x: Tensor, name: str, heads: int, causal: bool) -> Tensor:
        length, width = x.shape
        projected = self.linear(x, f"{name}in_proj_weight", f"{name}in_proj_bias")
        query, key, value = projected.reshape(length, 3, heads, -1).permute(1, 2, 0, 3)
        logits = query @ key.mT / math.sqrt(width / heads)
        if causal:
            logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = (logits.softmax(-1) @ value).permute(1, 0, 2).reshape(length, width)
        return self.linear(mixed, f"{name}out_proj.weight", f"{name}out_proj.bias")

    def transformer(self, x: Tensor, tower: str, causal: bool) -> Tensor:
        for i in range(LAYERS):
            block = f"{tower}transformer.resblocks.{i}."
            normed = self.norm(x, f"{block}ln_1")
            x = x + self.attention(normed, f"{block}attn.", HEADS[tower], causal)
            normed = self.norm(x, f"{block}ln_2")
            hidden = self.linear(normed, f"{block}mlp.c_fc.weight", f"{block}mlp.c_fc.bias")
            active = self.activation(hidden)
            x = x + self.linear(active, f"{block}mlp.c_proj.weight", f"{block}mlp.c_proj.bias")
        return x

    def image(self, pixels: np.ndarray) -> Tensor:
        """Embedding of (3, SIDE, SIDE) normalised pixels."""
        grid = SIDE // PATCH
        squares = torch.from_numpy(pixels).reshape(3, grid, PATCH, grid, PATCH)
        patches = squares.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
        embedded = patches @ self.w["visual.conv1.weight"].flatten(1).T
        x = torch.cat([self.w["visual.class_embedding"][None], embedded])
        x = self.norm(x + self.w["visual.positional_embedding"], "visual.ln_pre")
        x = self.transformer(x, "visual.", causal=False)
        return self.norm(x[0], "visual.ln_post") @ self.w["visual.proj"]

    def text(self, tokens: list[int]) -> Tensor:
        """Embedding of a text that ends with its end marker.

        With causal attention what would follow does not matter.
        """
        words = self.w["token_embedding.weight"][tokens]
        x = words + self.w["positional_embedding"][: len(tokens)]
        x = self.transformer(x, "", causal=True)
        return self.norm(x[-1], "ln_final") @ self.w["text_projection"]

    def cosine(self, pixels: np.ndarray, tokens: list[int]) -> float:
        image = self.image(pixels)
        text = self.text(tokens)
        return float(image @ text / image.norm() / text.norm())


# What goes into it


WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

# GPT-2's alphabet: these bytes stand for themselves.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def _symbol(byte: int) -> str:
    """The character of GPT-2's alphabet for a byte; the others are numbered from 256 on."""
    if byte in PRINTABLE:
        return chr(byte)
    others_before = [other for other in range(byte) if other not in PRINTABLE]
    return chr(256 + len(others_before))


def tokens(text: str) -> list[int]:
    """The byte tokens of a cleaned, lower-case text.

    They are cut to the context as open_clip cuts: the last one is the end marker.
    """
    vocabulary = tiny_tokenizer().get_vocab()
    ids = [vocabulary["<|startoftext|>"]]
    for word in WORDS.findall(text):
        symbols = [_symbol(byte) for byte in word.encode()]
        symbols[-1] += "</w>"
        ids += [vocabulary[symbol] for symbol in symbols]
    return [*ids[: CONTEXT - 1], vocabulary["<|endoftext|>"]]


def _bicubic(length: int, wanted: int) -> np.ndarray:
    """Keys' cubic (a = -1/2) as a matrix (wanted, length) whose rows sum to 1.

    It is widened by the shrinkage, so that it does not alias.
    """
    scale = length / wanted
    centre = (np.arange(wanted) + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5 - centre[:, None]) / max(scale, 1))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the deviation of CLIP's training images."""
    return (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(DEVIATION, (3, 1, 1))


def letterboxed(image: Image.Image) -> np.ndarray:
    """HPSv2's preparation: (3, SIDE, SIDE), normalised."""
    pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1) / 255
    longest = max(image.size)
    height = round(image.height * SIDE / longest)
    width = round(image.width * SIDE / longest)
    resized = _bicubic(image.height, height) @ pixels @ _bicubic(image.width, width).T

    box = np.zeros((3, SIDE, SIDE))
    top = (SIDE - height) // 2
    left = (SIDE - width) // 2
    box[:, top : top + height, left : left + width] = resized
    return normalise(box)


def cropped(image: Image.Image) -> np.ndarray:
    """CLIP's preparation: (3, SIDE, SIDE), normalised.

    Pillow resizes bytes, so it is Pillow here too.
    """
    width = max(SIDE, image.width * SIDE // image.height)
    height = max(SIDE, image.height * SIDE // image.width)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).transpose(2, 0, 1) / 255
    top = (height - SIDE) // 2
    left = (width - SIDE) // 2
    return normalise(pixels[:, top : top + SIDE, left : left + SIDE])
