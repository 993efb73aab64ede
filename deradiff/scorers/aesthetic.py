"""LAION's aesthetic predictor: a chain of linear layers on CLIP ViT-L/14's image vector.

The prompt does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from deradiff.scorers.base import EmbeddingScorer, digest
from deradiff.scorers.checkpoints import (
    Checkpoint,
    CheckpointLocation,
    check_shapes,
    find_checkpoint,
    locate_checkpoint,
    read_states,
)
from deradiff.scorers.clip import unit
from deradiff.scorers.preparation import centre_crop, normalise
from deradiff.scorers.published import AESTHETIC_HEAD, AESTHETIC_TOWER
from deradiff.scorers.spec import ScorerSpec

WIDTHS = (1024, 128, 64, 16, 1)
"""Numbers that each linear layer gives."""

LAYERS = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published Sequential.

Between them is dropout, which does nothing here, and no activation.
"""


def head_shapes(width: int) -> dict[str, torch.Size]:
    """Names and shapes of the published head's state dict, on vectors of `width`."""
    shapes: dict[str, torch.Size] = {}
    for layer, before, after in zip(LAYERS, (width, *WIDTHS), WIDTHS, strict=False):
        shapes[f"layers.{layer}.weight"] = torch.Size([after, before])
        shapes[f"layers.{layer}.bias"] = torch.Size([after])
    return shapes


def linear_chain(state: dict[str, Tensor]) -> nn.Sequential:
    """The head from a state dict under the published names, in float32."""
    layers = []
    for place in LAYERS:
        weight = state[f"layers.{place}.weight"].float()
        bias = state[f"layers.{place}.bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


def read_head(head: CheckpointLocation, width: int, device: str) -> dict[str, Tensor]:
    """The head's state dict; on the device `meta` only its shapes.

    Raises:
        ValueError: where it is of another layout or size.
    """
    state = read_states(head.weights(), device)
    what = (
        f"{head.source} is not the aesthetic predictor's linear chain "
        "(sac+logos+ava1-l14-linearMSE.pth)"
    )
    check_shapes(state, head_shapes(width), what)
    return state


class AestheticScorer(EmbeddingScorer):
    """`sac+logos+ava1-l14-linearMSE` behind the `Scorer` protocol.

    christophschuhmann/improved-aesthetic-predictor.

    Args:
        tower: CLIP ViT-L/14, whose unit image vector the head reads.
        head: where the linear chain lies.
        device: of the network.
    """

    name = "aesthetic"
    scale = "rating, about 1 to 10"

    def __init__(self, tower: Checkpoint, head: CheckpointLocation, device: str = "cpu") -> None:
        self.device = device
        self.side = tower.config.vision_config.image_size
        self.head = linear_chain(read_head(head, tower.config.projection_dim, "cpu")).to(device)
        self.model = tower.load().to(device)
        self.version = digest([*tower.files(), *head.weights()])
        self.preprocessing = (
            f"image: RGB, bicubic, shortest side to {self.side}, centre crop, CLIP mean and "
            "deviation; the prompt is not read"
        )

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Ratings (N,)."""
        return self.head(self.encode_images(images)).squeeze(-1)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """The tower's unit vectors (N, D), which the head reads."""
        cropped = torch.stack([centre_crop(image, self.side) for image in images])
        pixels = normalise(cropped).to(self.device)
        return unit(self.model.get_image_features(pixel_values=pixels))


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where `load` would, without reading a weight."""
    tower, head = _find(spec)
    if head.repo is None:
        read_head(head, tower.config.projection_dim, "meta")


def load(spec: ScorerSpec, device: str) -> AestheticScorer:
    """The scorer of a spec."""
    tower, head = _find(spec)
    return AestheticScorer(tower, head, device)


def _find(spec: ScorerSpec) -> tuple[Checkpoint, CheckpointLocation]:
    tower = find_checkpoint(AESTHETIC_TOWER, spec.checkpoint, spec.tokenizer, spec.model_config)
    return tower, locate_checkpoint(spec.head or AESTHETIC_HEAD)
