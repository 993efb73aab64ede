"""LAION's aesthetic predictor: a chain of linear layers on CLIP ViT-L/14's picture vector. The prompt does not count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from deradiff.scorers.base import BatchedScorer, digest
from deradiff.scorers.checkpoints import Checkpoint, Place, check_shapes, read_state
from deradiff.scorers.clip import unit
from deradiff.scorers.preparation import centre_crop, normalised

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (
    0,
    2,
    4,
    6,
    7,
)  # of the linear layers in the published Sequential; between them dropout, which does nothing here, and no activation


def head_shapes(width: int) -> dict[str, torch.Size]:
    """Names and shapes of the published head's state dict, on vectors of `width`."""
    shapes: dict[str, torch.Size] = {}
    for place, before, after in zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False):
        shapes |= {
            f"layers.{place}.weight": torch.Size([after, before]),
            f"layers.{place}.bias": torch.Size([after]),
        }
    return shapes


def linear_chain(state: dict[str, Tensor]) -> nn.Sequential:
    """The head from a state dict under the published names, in float32."""
    layers = []
    for place in PLACES:
        weight, bias = (
            state[f"layers.{place}.weight"].float(),
            state[f"layers.{place}.bias"].float(),
        )
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


def read_head(head: Place, width: int, device: str) -> dict[str, Tensor]:
    """The head's state dict; on the device `meta` only its shapes. Raises ValueError where it is of another layout or size."""
    state = {
        name: tensor for file in head.weights() for name, tensor in read_state(file, device).items()
    }
    what = f"{head.said} is not the aesthetic predictor's linear chain (sac+logos+ava1-l14-linearMSE.pth)"
    check_shapes(state, head_shapes(width), what)
    return state


class AestheticScorer(BatchedScorer):
    """`sac+logos+ava1-l14-linearMSE` (christophschuhmann/improved-aesthetic-predictor) behind the `Scorer` protocol.

    tower: CLIP ViT-L/14, whose unit picture vector the head reads. head: where the linear chain lies.
    """

    name = "aesthetic"
    scale = "rating, about 1 to 10"

    def __init__(self, tower: Checkpoint, head: Place, device: str = "cpu") -> None:
        self.device, self.side = device, tower.config.vision_config.image_size
        self.head = linear_chain(read_head(head, tower.config.projection_dim, "cpu")).to(device)
        self.model = tower.load().to(device)
        self.version = digest([*tower.files(), *head.weights()])
        self.preprocessing = f"picture: RGB, bicubic, shortest side to {self.side}, centre crop, CLIP mean and deviation; the prompt is not read"

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = normalised(torch.stack([centre_crop(image, self.side) for image in images])).to(
            self.device
        )
        return self.head(unit(self.model.get_image_features(pixel_values=pixels))).squeeze(-1)
