"""Scorers in CLIP's format: contrastive training on captions, and preference training on pairs (PickScore, Kirstain et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deradiff.data.pairs import Item
from deradiff.training.objectives import Batch


class _Clip:
    """What both objectives share: a CLIPModel, its tokenizer and its image processor, saved as one folder."""

    def __init__(self, clip: nn.Module, tokenizer: Any, processor: Any) -> None:
        self.network, self.tokenizer, self.processor = clip, tokenizer, processor
        self.frozen: list[nn.Module] = []

    def tokens(self, captions: list[str]) -> dict[str, Tensor]:
        return dict(
            self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        )

    def save(self, run_dir: Path) -> Path:
        folder = run_dir / "clip"
        for part in (self.network, self.tokenizer, self.processor):
            part.save_pretrained(folder)  # type: ignore[operator]
        return folder


class Contrastive(_Clip):
    """CLIP's symmetric contrastive loss (Radford et al. 2021), where pictures of one caption are all that caption's positives."""

    def collate(self, items: list[Item]) -> Batch:
        captions = sorted({i.caption for i in items})
        owner = torch.tensor([captions.index(i.caption) for i in items])
        images = self.processor([i.images[0] for i in items], return_tensors="pt")["pixel_values"]
        return {"pixel_values": images, "owner": owner, **self.tokens(captions)}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = {k: v for k, v in batch.items() if k != "owner"}
        logits, owner = network(**inputs).logits_per_image, batch["owner"]  # (images, captions)
        positives = F.one_hot(owner, logits.shape[1]).T.float()
        to_text = F.cross_entropy(logits, owner)
        to_image = F.cross_entropy(logits.T, positives / positives.sum(1, keepdim=True))
        return (to_text + to_image) / 2, {"accuracy": (logits.argmax(1) == owner).float().mean()}


class Preference(_Clip):
    """PickScore's loss (Kirstain et al. 2023, Eq. 2): cross-entropy of the winner under the two pictures' scaled cosines to the prompt."""

    def collate(self, items: list[Item]) -> Batch:
        images = self.processor(
            [picture for i in items for picture in i.images], return_tensors="pt"
        )["pixel_values"]
        return {"pixel_values": images, **self.tokens([i.caption for i in items])}

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = network(**batch).logits_per_image  # (2B, B)
        pairs = len(logits) // 2
        own = logits.unflatten(0, (pairs, 2))[
            torch.arange(pairs), :, torch.arange(pairs)
        ]  # (B, 2), winner first
        winner = torch.zeros(pairs, dtype=torch.long, device=own.device)
        return F.cross_entropy(own, winner), {"accuracy": (own[:, 0] > own[:, 1]).float().mean()}
