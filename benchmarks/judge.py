"""A judge of the shapes world that is no CLIP: a small CNN with a head per word of the caption,
trained on fresh renders."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from deradiff.data.pairs import image_tensor
from deradiff.worlds import shapes

HEADS = {
    "size": list(shapes.RADII),
    "colour": list(shapes.HUES),
    "shape": list(shapes.SHAPES),
    "background": list(shapes.BACKGROUNDS),
}


class Judge(nn.Module):
    """Pictures (N, 3, 32, 32) -> logits per head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for into, out in ((3, 32), (32, 64), (64, 96)):
            layers += [
                nn.Conv2d(into, out, 3, padding=1),
                nn.GroupNorm(8, out),
                nn.GELU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.GELU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(128, len(words)) for name, words in HEADS.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.body(images)
        return {name: head(hidden) for name, head in self.heads.items()}


def _labels(scenes: list[shapes.Scene]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([words.index(getattr(s, name)) for s in scenes])
        for name, words in HEADS.items()
    }


def train_judge(steps: int = 500, seed: int = 0) -> Judge:
    """About a minute on one core."""
    torch.manual_seed(seed)
    judge, rng = Judge(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        scenes = [shapes.SCENES[i] for i in rng.integers(0, len(shapes.SCENES), 96)]
        images = (
            torch.from_numpy(shapes.render(scenes, rng)).permute(0, 3, 1, 2).float() / 127.5 - 1
        )
        logits = judge(images + 0.05 * torch.randn_like(images))
        loss = torch.stack(
            [F.cross_entropy(logits[name], target) for name, target in _labels(scenes).items()]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: list[Image.Image], captions: list[str]) -> dict[str, np.ndarray]:
    """Per head, and for all heads at once (`all`): is each picture what its caption says? Boolean
    (N,)."""
    logits, labels = (
        judge(torch.stack([image_tensor(i, 32) for i in images])),
        _labels([shapes.scene_of(c) for c in captions]),
    )
    right = {name: (logits[name].argmax(1) == labels[name]).numpy() for name in HEADS}
    return right | {"all": np.logical_and.reduce(list(right.values()))}
