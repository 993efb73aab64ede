"""The scorers that are a CLIP network: cosine of a picture and its prompt, as each published recipe prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deradiff.scorers.base import BatchedScorer, digest
from deradiff.scorers.checkpoints import Checkpoint
from deradiff.scorers.preparation import clean_text, letterbox
from deradiff.scorers.recipes import Recipe


class CLIPScorer(BatchedScorer):
    """A CLIP network behind the `Scorer` protocol.

    factor: what the cosine is multiplied by (1, or exp(logit_scale) for PickScore); `score / factor` is the cosine.
    """

    def __init__(self, recipe: Recipe, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.recipe, self.device = recipe, device
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.processor
        self.model = checkpoint.load().to(device)
        self.side = checkpoint.config.vision_config.image_size
        self.context = checkpoint.config.text_config.max_position_embeddings
        self.factor = self.model.logit_scale.exp().item() if recipe.scaled else 1.0

        self.name = recipe.name
        self.version = digest(checkpoint.files())
        self.scale = "logit-scaled cosine" if recipe.scaled else "cosine"
        resize = (
            "longest side to {} (antialiased), black padding"
            if recipe.letterbox
            else "shortest side to {}, centre crop"
        )
        words = (
            "mended, HTML-unescaped twice, white space collapsed, lower case"
            if recipe.clean
            else "as the tokenizer reads it"
        )
        self.preprocessing = f"picture: RGB, bicubic, {resize.format(self.side)}, CLIP mean and deviation; prompt: {words}"

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        row = {
            prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))
        }  # a prompt of many pictures is encoded once
        text = self.encode_prompts(list(row))[[row[prompt] for prompt in prompts]]
        return self.factor * (self.encode_images(images) * text).sum(-1)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors (N, D) of N RGB pictures."""
        if self.recipe.letterbox:
            mean, deviation = (
                torch.tensor(values).view(3, 1, 1)
                for values in (self.processor.image_mean, self.processor.image_std)
            )
            pixels = (
                torch.stack([letterbox(image, self.side) for image in images]) - mean
            ) / deviation
        else:
            pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return unit(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (N, D) of N prompts. Padded to the full context, so that a score does not depend on its neighbours in the batch."""
        texts = [clean_text(prompt) for prompt in prompts] if self.recipe.clean else list(prompts)
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.context,
            return_tensors="pt",
        )
        return unit(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.device)))


def unit(features: Any) -> Tensor:
    """Features (N, D) at length 1."""
    # transformers 5 returns the features as an output object's pooler_output, 4 returned the tensor
    return F.normalize(features if isinstance(features, Tensor) else features.pooler_output, dim=-1)
