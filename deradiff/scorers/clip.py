"""The scorers that are a CLIP network: cosine of an image and its prompt, prepared as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deradiff.scorers.base import EmbeddingScorer, digest
from deradiff.scorers.checkpoints import Checkpoint, find_checkpoint
from deradiff.scorers.preparation import clean_text, letterbox
from deradiff.scorers.published import PUBLISHED_CLIPS, PublishedCLIP
from deradiff.scorers.spec import ScorerSpec


class CLIPScorer(EmbeddingScorer):
    """A CLIP network behind the `Scorer` protocol.

    Args:
        published: how images and prompts are prepared, and the cosine scaled.
        checkpoint: the network.
        device: of the network.

    Attributes:
        factor: what the cosine is multiplied by: 1, or exp(logit_scale) for PickScore.
        side: pixels of an image's side, as the network sees it.
        context: tokens of a prompt.
    """

    def __init__(
        self, published: PublishedCLIP, checkpoint: Checkpoint, device: str = "cpu"
    ) -> None:
        self.published = published
        self.device = device
        self.tokenizer = checkpoint.tokenizer
        self.processor = checkpoint.processor
        self.model = checkpoint.load().to(device)
        self.side = checkpoint.config.vision_config.image_size
        self.context = checkpoint.config.text_config.max_position_embeddings
        self.factor = self.model.logit_scale.exp().item() if published.scaled else 1.0

        # What it states of itself
        self.name = published.name
        self.version = digest(checkpoint.files())
        self.scale = "logit-scaled cosine" if published.scaled else "cosine"
        self.preprocessing = self._describe_preparation()

    def _describe_preparation(self) -> str:
        resizing = f"shortest side to {self.side}, centre crop"
        if self.published.letterbox:
            resizing = f"longest side to {self.side} (antialiased), black padding"
        words = "as the tokenizer reads it"
        if self.published.clean:
            words = "mended, HTML-unescaped twice, white space collapsed, lower case"
        return f"image: RGB, bicubic, {resizing}, CLIP mean and deviation; prompt: {words}"

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,). A prompt of many images is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: i for i, prompt in enumerate(distinct)}
        text = self.encode_prompts(distinct)[[row[prompt] for prompt in prompts]]
        return self.factor * (self.encode_images(images) * text).sum(-1)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) of N RGB images."""
        if self.published.letterbox:
            mean = torch.tensor(self.processor.image_mean).view(3, 1, 1)
            deviation = torch.tensor(self.processor.image_std).view(3, 1, 1)
            stacked = torch.stack([letterbox(image, self.side) for image in images])
            pixels = (stacked - mean) / deviation
        else:
            pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return unit(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of N prompts.

        Padded to the full context, so that a score does not depend on its neighbours in the batch.
        """
        texts = list(prompts)
        if self.published.clean:
            texts = [clean_text(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return unit(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.device)))


def unit(features: Any) -> Tensor:
    """Features (N, D) at length 1.

    transformers 5 returns them as `pooler_output` of an output object, 4 as the tensor.
    """
    if not isinstance(features, Tensor):
        features = features.pooler_output
    return F.normalize(features, dim=-1)


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where `load` would, without reading a weight."""
    _find(spec)


def load(spec: ScorerSpec, device: str) -> CLIPScorer:
    """The scorer of a spec."""
    return CLIPScorer(PUBLISHED_CLIPS[spec.name], _find(spec), device)


def _find(spec: ScorerSpec) -> Checkpoint:
    published = PUBLISHED_CLIPS[spec.name]
    return find_checkpoint(published, spec.checkpoint, spec.tokenizer, spec.model_config)
