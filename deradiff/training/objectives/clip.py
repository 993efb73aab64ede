"""Scorers in CLIP's format: contrastive training on captions, and preference training on pairs.

Shapes: B examples; of these, K distinct captions of L tokens; images of R x R pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deradiff.data.pairs import Item
from deradiff.training.objectives.base import Batch, Parts
from deradiff.worlds import networks


class _ClipObjective:
    """What both objectives share: a CLIP, its tokenizer and its image processor in one folder."""

    def __init__(self, clip: nn.Module, tokenizer: Any, processor: Any) -> None:
        self.network: Any = clip
        self.tokenizer = tokenizer
        self.processor = processor
        self.frozen: list[nn.Module] = []

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask, (number of captions, L) each."""
        encoded = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        return dict(encoded)

    def prepare_checkpoint(self) -> None:
        """Nothing is held back."""

    def save(self, folder: Path) -> None:
        """Write the CLIP as transformers loads it."""
        for part in (self.network, self.tokenizer, self.processor):
            part.save_pretrained(folder)


class Contrastive(_ClipObjective):
    """CLIP's symmetric contrastive loss (Radford et al. 2021).

    Images with the same caption are all positives of that caption.

    Args:
        clip: a CLIPModel.
        tokenizer: of captions.
        processor: of images.
    """

    @classmethod
    def from_parts(cls, parts: Parts) -> Contrastive:
        """A new CLIP whose vocabulary is that of the run's captions."""
        tokenizer = networks.make_tokenizer(sorted(set(parts.data.captions)))
        clip = networks.make_clip(tokenizer, parts.resolution, width=parts.clip_width)
        return cls(clip, tokenizer, networks.make_image_processor(parts.resolution))

    def collate(self, items: list[Item]) -> Batch:
        """pixel_values (B, 3, R, R), tokens of the K captions, and owner (B,).

        owner: which of the K captions an image has.
        """
        captions = sorted({item.caption for item in items})
        owner = torch.tensor([captions.index(item.caption) for item in items])
        images = [item.images[0] for item in items]
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "owner": owner, **self.tokens(captions)}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the losses from images to captions and back; logs the accuracy."""
        # The scaled cosine of every image with every distinct caption.
        inputs = {name: value for name, value in batch.items() if name != "owner"}
        owner = batch["owner"]
        logits = network(**inputs).logits_per_image  # (B, K)

        # An image has one caption. A caption may have several images, which share its probability.
        image_to_caption = F.cross_entropy(logits, owner)
        positives = F.one_hot(owner, logits.shape[1]).T.float()  # (K, B)
        caption_to_image = F.cross_entropy(logits.T, positives / positives.sum(1, keepdim=True))
        accuracy = (logits.argmax(1) == owner).float().mean()
        return (image_to_caption + caption_to_image) / 2, {"accuracy": accuracy}


class Preference(_ClipObjective):
    """PickScore's loss (Kirstain et al. 2023, Eq. 2).

    The cross-entropy of the winner under the two images' scaled cosines to the prompt.

    Args:
        clip: a CLIPModel.
        tokenizer: of captions.
        processor: of images.
    """

    @classmethod
    def from_parts(cls, parts: Parts) -> Preference:
        """The CLIP that the run starts from."""
        return cls(*parts.clip)

    def collate(self, items: list[Item]) -> Batch:
        """pixel_values (2 B, 3, R, R), the winner of each pair first, and tokens of B captions."""
        images = []
        for item in items:
            images += item.images
        pixel_values = self.processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, **self.tokens([item.caption for item in items])}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the pairs; logs the accuracy."""
        logits = network(**batch).logits_per_image  # (2 B, B)
        pairs = len(logits) // 2

        # Each pair's images against its own caption: (B, 2), winner first.
        pair = torch.arange(pairs)
        own = logits.unflatten(0, (pairs, 2))[pair, :, pair]

        # A choice between two images, of which the first is right.
        winner = torch.zeros(pairs, dtype=torch.long, device=own.device)
        accuracy = (own[:, 0] > own[:, 1]).float().mean()
        return F.cross_entropy(own, winner), {"accuracy": accuracy}
