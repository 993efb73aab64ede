"""ImageReward (Xu et al. 2023) without its package: transformers' BLIP, whose text reads the
picture, and a chain of linear layers.

The published file is a plain state dict in BLIP's own names; it is renamed, not changed. Sizes are
read off the tensors' shapes: heads are 64 wide in BLIP's both towers, which is the one thing that
no shape shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from deradiff.scorers.aesthetic import head_shapes, linear_chain
from deradiff.scorers.base import BatchedScorer, digest
from deradiff.scorers.checkpoints import (
    CheckpointLocation,
    check_shapes,
    locate_checkpoint,
    read_states,
    snapshot,
)
from deradiff.scorers.preparation import centre_crop, normalised
from deradiff.scorers.spec import ScorerSpec

CHECKPOINT, TOKENIZER = "THUDM/ImageReward/ImageReward.pt", "google-bert/bert-base-uncased"
MEAN, DEVIATION = (
    0.16717362830052426,
    1.0333394966054072,
)  # of its rewards, by which it is standardised
CONTEXT, HEAD_WIDTH = (
    35,
    64,
)  # tokens of a prompt, the rest is cut off; numbers of one attention head
VOCABULARY = ["tokenizer.json", "vocab.txt"]  # either is enough

_UNUSED = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.embeddings.position_ids",
)  # of BLIP's contrastive training; constants
_PARTS = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    "mlp.": "head.",
}
_IN_BLOCK = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's state dict under the names of `vision` (BlipVisionModel), `text`
    (BlipTextModel) and `head`; others keep theirs."""
    converted = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        part = next((part for part in _PARTS if name.startswith(part)), "")
        renamed = _PARTS.get(part, "") + name.removeprefix(part)
        if part == "blip.visual_encoder.blocks.":
            for theirs, ours in _IN_BLOCK.items():
                renamed = renamed.replace(theirs, ours)
        converted[renamed] = tensor
    return converted


def _layers(state: dict[str, Tensor], stem: str) -> int:
    return 1 + max(
        (int(name.removeprefix(stem).split(".")[0]) for name in state if name.startswith(stem)),
        default=-1,
    )


def networks(state: dict[str, Tensor], device: str) -> tuple[Any, Any]:
    """BlipVisionModel and BlipTextModel of the sizes of a converted state dict, on the device; not
    its weights. Raises KeyError."""
    patches, words = (
        state["vision.embeddings.patch_embedding.weight"],
        state["text.embeddings.word_embeddings.weight"],
    )
    width, patch, positions = (
        patches.shape[0],
        patches.shape[-1],
        state["vision.embeddings.position_embedding"].shape[1],
    )
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        patch_size=patch,
        num_hidden_layers=_layers(state, "vision.encoder.layers."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * math.isqrt(positions - 1),
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=width,
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        num_hidden_layers=_layers(state, "text.encoder.layer."),
        pad_token_id=0,
        bos_token_id=None,
        sep_token_id=None,
        eos_token_id=None,
        max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # for its cross attention
    )
    with torch.device(device):
        return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)


@dataclass(frozen=True)
class ImageRewardCheckpoint:
    """ImageReward's file and BERT's tokenizer, found; the weights are yet to be read. vocabulary:
    the file of the tokenizer."""

    location: CheckpointLocation
    tokenizer: Any
    vocabulary: Path

    def read(self, device: str) -> tuple[dict[str, Tensor], Any, Any]:
        """The converted state dict and, without its weights, its two networks. Raises ValueError
        where it is of another layout or size."""
        state = convert(read_states(self.location.weights(), device))
        what = f"{self.location.source} is not ImageReward's state dict"
        try:
            vision, text = networks(state, device)
        except KeyError as missing:
            raise ValueError(
                f"{what}: it holds no {missing.args[0]} (in transformers' names)"
            ) from missing
        towers = {"vision": vision.state_dict(), "text": text.state_dict()}
        wanted: dict[str, torch.Size] = {}
        for tower, held in towers.items():
            wanted |= {f"{tower}.{name}": tensor.shape for name, tensor in held.items()}
        wanted |= {
            f"head.{name}": shape for name, shape in head_shapes(text.config.hidden_size).items()
        }
        check_shapes(state, wanted, what)
        if len(self.tokenizer) > text.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens and {self.location.source} "
                f"knows {text.config.vocab_size}"
            )
        return state, vision, text


def find_imagereward(checkpoint: str | None, tokenizer: str | None) -> ImageRewardCheckpoint:
    """What `ImageRewardScorer` needs, checked as far as can be without reading weights. Raises
    ValueError."""
    where, words = locate_checkpoint(checkpoint or CHECKPOINT), tokenizer or TOKENIZER
    if where.file is None:
        raise ValueError(
            f"{where.source} is a folder: give ImageReward's file, such as {CHECKPOINT} or a "
            f"path that ends in ImageReward.pt"
        )
    folder = (
        Path(words)
        if Path(words).is_dir()
        else snapshot(words, [*VOCABULARY, "tokenizer_config.json"])
    )
    vocabulary = next((folder / name for name in VOCABULARY if (folder / name).is_file()), None)
    if vocabulary is None:
        raise ValueError(
            f"{words} holds no BERT tokenizer: give tokenizer= a hub id, or a folder with a "
            f"vocab.txt"
        )
    found = ImageRewardCheckpoint(where, BertTokenizer.from_pretrained(folder), vocabulary)
    if where.repo is None:
        found.read("meta")
    return found


class ImageRewardScorer(BatchedScorer):
    """ImageReward-v1.0 behind the `Scorer` protocol: the text's first token, after it has read the
    picture, through the linear chain."""

    name = "imagereward"
    scale = "standardised reward"

    def __init__(self, checkpoint: ImageRewardCheckpoint, device: str = "cpu") -> None:
        state, vision, text = checkpoint.read("cpu")

        def part(stem: str) -> dict[str, Tensor]:
            names = [name for name in state if name.startswith(stem)]
            return {name.removeprefix(stem): state[name].float() for name in names}

        for network, stem in ((vision, "vision."), (text, "text.")):
            network.load_state_dict(part(stem))
        self.vision, self.text = vision.eval().to(device), text.eval().to(device)
        self.head: nn.Module = linear_chain(part("head.")).to(device)
        self.tokenizer, self.device, self.side = (
            checkpoint.tokenizer,
            device,
            self.vision.config.image_size,
        )
        self.version = digest([*checkpoint.location.weights(), checkpoint.vocabulary])
        self.preprocessing = (
            f"picture: RGB, bicubic, shortest side to {self.side}, centre crop, CLIP mean and "
            f"deviation; "
            f"prompt: BERT's lower-case words, the first {CONTEXT} tokens"
        )

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = normalised(torch.stack([centre_crop(image, self.side) for image in images])).to(
            self.device
        )
        seen = self.vision(pixel_values=pixels).last_hidden_state
        words = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        ).to(self.device)
        read = self.text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=seen,
        )
        return (self.head(read.last_hidden_state[:, 0]).squeeze(-1) - MEAN) / DEVIATION


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where `load` would, without reading a weight."""
    find_imagereward(spec.checkpoint, spec.tokenizer)


def load(spec: ScorerSpec, device: str) -> ImageRewardScorer:
    """The scorer of a spec."""
    return ImageRewardScorer(find_imagereward(spec.checkpoint, spec.tokenizer), device)
