"""A judge of the shapes world that is no CLIP: a small CNN with a head for each word of a caption.

It is trained on fresh renders. Shapes: N images of 32 x 32 pixels.
"""

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
"""The words of a caption, and what each of them may be."""

BATCH = 96
"""Renders of one training step."""

NOISE = 0.05
"""Standard deviation of the noise on them, so that sampled images are judged as renders are."""


class Judge(nn.Module):
    """From images (N, 3, 32, 32) to the logits (N, words) of each head."""

    def __init__(self) -> None:
        super().__init__()
        # Three blocks, each of which halves the sides: 32, 16, 8, 4.
        layers: list[nn.Module] = []
        for channels_in, channels in ((3, 32), (32, 64), (64, 96)):
            layers += [
                nn.Conv2d(channels_in, channels, 3, padding=1),
                nn.GroupNorm(8, channels),
                nn.GELU(),
                nn.MaxPool2d(2),
            ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, 128), nn.GELU())

        # A linear head for each word.
        heads = {name: nn.Linear(128, len(words)) for name, words in HEADS.items()}
        self.heads = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits of each head."""
        hidden = self.body(images)
        return {name: head(hidden) for name, head in self.heads.items()}


def _labels(scenes: list[shapes.Scene]) -> dict[str, Tensor]:
    """The right word of each head, by its number (N,)."""
    labels = {}
    for name, words in HEADS.items():
        labels[name] = torch.tensor([words.index(getattr(scene, name)) for scene in scenes])
    return labels


def train_judge(steps: int = 500, seed: int = 0) -> Judge:
    """A trained judge; about a minute on one core.

    Args:
        steps: of training.
        seed: of its weights, and of the renders.
    """
    torch.manual_seed(seed)
    judge = Judge()
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        # Fresh renders, with noise.
        scenes = [shapes.SCENES[i] for i in rng.integers(0, len(shapes.SCENES), BATCH)]
        renders = torch.from_numpy(shapes.render(scenes, rng))
        images = renders.permute(0, 3, 1, 2).float() / 127.5 - 1
        logits = judge(images + NOISE * torch.randn_like(images))

        # The loss is the sum over the heads.
        labels = _labels(scenes)
        losses = [F.cross_entropy(logits[name], label) for name, label in labels.items()]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return judge.eval()


@torch.no_grad()
def verdicts(judge: Judge, images: list[Image.Image], captions: list[str]) -> dict[str, np.ndarray]:
    """Whether each image shows what its caption says.

    Args:
        judge: a trained one.
        images: N of them.
        captions: of the images.

    Returns:
        (N,) booleans by the name of a head; `all`: for all heads at once.
    """
    logits = judge(torch.stack([image_tensor(image, 32) for image in images]))
    labels = _labels([shapes.scene_of(caption) for caption in captions])
    right = {}
    for name in HEADS:
        right[name] = (logits[name].argmax(1) == labels[name]).numpy()
    right["all"] = np.logical_and.reduce(list(right.values()))
    return right
