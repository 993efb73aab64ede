"""ImageReward (Xu et al. 2023) without its package.

It is transformers' BLIP, whose text tower reads the image, and a chain of linear layers. The
published file is a plain state dict in BLIP's own names; it is renamed, not changed. Sizes are read
off the tensors' shapes, but for the width of an attention head, which no shape shows.

Shapes: N images with a prompt each, L tokens of a prompt, P patches of an image and one more token,
C channels of the text tower.
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
from deradiff.scorers.preparation import centre_crop, normalise
from deradiff.scorers.spec import ScorerSpec

CHECKPOINT = "THUDM/ImageReward/ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"

MEAN = 0.16717362830052426
"""Of its rewards; with the deviation it standardises them."""

DEVIATION = 1.0333394966054072
"""Of its rewards."""

CONTEXT = 35
"""Tokens of a prompt; the rest is cut off."""

HEAD_WIDTH = 64
"""Channels of one attention head, in both of BLIP's towers."""

VOCABULARY_FILES = ("tokenizer.json", "vocab.txt")
"""Either is enough."""

# Of BLIP's contrastive training, and constants.
_UNUSED = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.embeddings.position_ids",
)

# How a tensor's name begins, in the published file and here.
_BLOCKS = "blip.visual_encoder.blocks."
_PREFIXES = {
    "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    _BLOCKS: "vision.encoder.layers.",
    "blip.visual_encoder.norm.": "vision.post_layernorm.",
    "blip.text_encoder.": "text.",
    "mlp.": "head.",
}

# Names inside a block of the image tower.
_IN_BLOCK = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring ImageReward's state dict under transformers' names.

    Args:
        state: under the published file's names.

    Returns:
        The tensors that are used: `vision.` of a BlipVisionModel, `text.` of a BlipTextModel, and
        `head.`. One that is unknown keeps its name.
    """
    used = {name: tensor for name, tensor in state.items() if not name.startswith(_UNUSED)}
    return {_rename(name): tensor for name, tensor in used.items()}


def _rename(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    new_name = _PREFIXES.get(prefix, "") + name.removeprefix(prefix)
    if prefix == _BLOCKS:
        for theirs, ours in _IN_BLOCK.items():
            new_name = new_name.replace(theirs, ours)
    return new_name


def _count_layers(state: dict[str, Tensor], stem: str) -> int:
    """One more than the highest number that follows the stem in a name; 0 if none does."""
    names = [name for name in state if name.startswith(stem)]
    numbers = [int(name.removeprefix(stem).split(".")[0]) for name in names]
    return 1 + max(numbers, default=-1)


def make_towers(state: dict[str, Tensor], device: str) -> tuple[Any, Any]:
    """Make the two towers in the sizes of a state dict, without its weights.

    Args:
        state: a converted state dict.
        device: of the towers; `meta` for their shapes alone.

    Returns:
        A BlipVisionModel and a BlipTextModel.

    Raises:
        KeyError: where a tensor is missing from which a size is read.
    """
    patches = state["vision.embeddings.patch_embedding.weight"]
    words = state["text.embeddings.word_embeddings.weight"]
    vision_width = patches.shape[0]
    patch_side = patches.shape[-1]
    positions = state["vision.embeddings.position_embedding"].shape[1]
    vocabulary, text_width = words.shape

    vision = BlipVisionConfig(
        hidden_size=vision_width,
        intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        patch_size=patch_side,
        num_hidden_layers=_count_layers(state, "vision.encoder.layers."),
        num_attention_heads=vision_width // HEAD_WIDTH,
        image_size=patch_side * math.isqrt(positions - 1),  # one position is the class token's
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=vision_width,
        num_attention_heads=text_width // HEAD_WIDTH,
        intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        num_hidden_layers=_count_layers(state, "text.encoder.layer."),
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
    """ImageReward's file and BERT's tokenizer; the weights are not read yet.

    Attributes:
        location: where ImageReward's file lies.
        tokenizer: BERT's.
        vocabulary: the file from which the tokenizer was read.
    """

    location: CheckpointLocation
    tokenizer: Any
    vocabulary: Path

    def read(self, device: str) -> tuple[dict[str, Tensor], Any, Any]:
        """Read the file, and compare names and shapes with the towers of its sizes.

        Args:
            device: of the tensors; on `meta` only their shapes are read.

        Returns:
            The converted state dict and, without its weights, a BlipVisionModel and a
            BlipTextModel.

        Raises:
            ValueError: where the file is of another layout, or does not fit the tokenizer.
        """
        state = convert(read_states(self.location.weights(), device))
        what = f"{self.location.source} is not ImageReward's state dict"
        try:
            vision, text = make_towers(state, device)
        except KeyError as missing:
            raise ValueError(
                f"{what}: it holds no {missing.args[0]} (in transformers' names)"
            ) from missing

        # Every tensor of the towers and the head, and no other.
        wanted: dict[str, torch.Size] = {}
        for tower, network in (("vision", vision), ("text", text)):
            for name, tensor in network.state_dict().items():
                wanted[f"{tower}.{name}"] = tensor.shape
        for name, shape in head_shapes(text.config.hidden_size).items():
            wanted[f"head.{name}"] = shape
        check_shapes(state, wanted, what)

        if len(self.tokenizer) > text.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens and {self.location.source} "
                f"knows {text.config.vocab_size}: give tokenizer= the folder of its own"
            )
        return state, vision, text


def find_imagereward(checkpoint: str | None, tokenizer: str | None) -> ImageRewardCheckpoint:
    """Find ImageReward's files, and check them as far as can be without reading weights.

    Args:
        checkpoint: as of `load_scorer`.
        tokenizer: as of `load_scorer`.

    Raises:
        ValueError: where something is missing or does not fit.
    """
    location = locate_checkpoint(checkpoint or CHECKPOINT)
    if location.file is None:
        raise ValueError(
            f"{location.source} is a folder: give ImageReward's file, such as {CHECKPOINT} or a "
            "path that ends in ImageReward.pt"
        )

    # The tokenizer, from a folder or from the hub.
    tokenizer = tokenizer or TOKENIZER
    folder = Path(tokenizer)
    if not folder.is_dir():
        folder = snapshot(tokenizer, [*VOCABULARY_FILES, "tokenizer_config.json"], "tokenizer")
    files = [folder / name for name in VOCABULARY_FILES]
    vocabulary = next((file for file in files if file.is_file()), None)
    if vocabulary is None:
        raise ValueError(
            f"{tokenizer} holds no BERT tokenizer: give tokenizer= a hub id, or a folder with a "
            "vocab.txt"
        )

    result = ImageRewardCheckpoint(location, BertTokenizer.from_pretrained(folder), vocabulary)
    is_on_this_machine = location.repo is None
    if is_on_this_machine:
        result.read("meta")
    return result


class ImageRewardScorer(BatchedScorer):
    """ImageReward-v1.0 behind the `Scorer` protocol.

    The text's first token, after it has read the image, goes through the linear chain.

    Args:
        checkpoint: the network and its tokenizer.
        device: of the network.

    Attributes:
        side: pixels of an image's side, as the network sees it.
    """

    name = "imagereward"
    scale = "standardised reward"

    def __init__(self, checkpoint: ImageRewardCheckpoint, device: str = "cpu") -> None:
        state, vision, text = checkpoint.read("cpu")
        vision.load_state_dict(_part(state, "vision."))
        text.load_state_dict(_part(state, "text."))
        self.vision = vision.eval().to(device)
        self.text = text.eval().to(device)
        self.head: nn.Module = linear_chain(_part(state, "head.")).to(device)
        self.tokenizer = checkpoint.tokenizer
        self.device = device
        self.side = self.vision.config.image_size

        # What it states of itself
        self.version = digest([*checkpoint.location.weights(), checkpoint.vocabulary])
        self.preprocessing = (
            f"image: RGB, bicubic, shortest side to {self.side}, centre crop, CLIP mean and "
            f"deviation; prompt: BERT's lower-case words, the first {CONTEXT} tokens"
        )

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Rewards (N,), standardised."""
        # The image tower, (N, P + 1, channels).
        cropped = torch.stack([centre_crop(image, self.side) for image in images])
        pixels = normalise(cropped).to(self.device)
        image_features = self.vision(pixel_values=pixels).last_hidden_state

        # The text tower, which reads the image, (N, L, C). Padding to the full context keeps a
        # score independent of its neighbours in the batch.
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=CONTEXT,
            return_tensors="pt",
        ).to(self.device)
        text_features = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=image_features,
        ).last_hidden_state

        # The head, on the first token.
        rewards = self.head(text_features[:, 0]).squeeze(-1)
        return (rewards - MEAN) / DEVIATION


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under the rest of their names, in float32."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name].float() for name in names}


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where `load` would, without reading a weight."""
    find_imagereward(spec.checkpoint, spec.tokenizer)


def load(spec: ScorerSpec, device: str) -> ImageRewardScorer:
    """The scorer of a spec."""
    return ImageRewardScorer(find_imagereward(spec.checkpoint, spec.tokenizer), device)
