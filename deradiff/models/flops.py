"""FLOPs of training, counted on the model's own config, and what realignment saves of them.

A multiply-add counts as 2 FLOPs, as torch's counter does. Only matrix products, convolutions and
attention are counted. Everything runs on the meta device: no memory and no arithmetic.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from deradiff.models.families import family_of_config
from deradiff.models.family import Family, Plain

DEFAULT_CLASS = "UNet2DConditionModel"
"""The denoiser's class where a config does not name one."""

BACKWARD_COST = {"full": 2, "lora": 1}
"""Cost of a backward pass, in forwards.

`full`: gradients of activations and of weights. `lora`: gradients of activations alone; measured
1.14 on SD1.5 and 1.09 on SDXL, because attention has no weights.
"""


def meta_denoiser(config: Mapping[str, Any]) -> Any:
    """The network of a diffusers config, without weights.

    Args:
        config: its `_class_name` is the network's class, by default a UNet.
    """
    network_type = getattr(diffusers, config.get("_class_name", DEFAULT_CLASS))
    with torch.device("meta"):
        return network_type.from_config(dict(config))


def denoiser_family(config: Mapping[str, Any]) -> Family:
    """The family of a denoiser's config, by default a UNet's.

    Raises:
        ValueError: for a network of no known family.
    """
    family = family_of_config({"_class_name": DEFAULT_CLASS, **config})
    if family is None:
        raise ValueError(f"a {config['_class_name']} belongs to no family that deradiff knows")
    return family


def denoiser_inputs(
    config: Mapping[str, Any], height: int, width: int, tokens: int = 77, images: int = 1
) -> dict[str, Any]:
    """Meta tensors for one forward on latent images, by argument of the denoiser's `forward`.

    Args:
        config: the denoiser's config.
        height: of the latents (an image's pixels / 8 for the published autoencoders).
        width: of the latents.
        tokens: of the prompt.
        images: latent images, each with a prompt of its own.

    Raises:
        ValueError: for a network of no known family.
    """
    family = denoiser_family(config)
    inputs = {}
    for name, shape in family.input_shapes(config, height, width, tokens).items():
        rows = 1 if name in family.shared_arguments else images
        inputs[name] = _meta_argument(shape, rows)
    return inputs


def _meta_argument(shape: Any, rows: int) -> Any:
    """An argument of a network, from what `deradiff.models.family.Shapes` says of one image."""
    if isinstance(shape, Mapping):
        return {name: _meta_argument(part, rows) for name, part in shape.items()}
    # A list has an entry for each image.
    if isinstance(shape, Plain):
        return rows * shape.value if isinstance(shape.value, list) else shape.value
    if isinstance(shape, list):
        return rows * [_meta_argument(part, 1) for part in shape]
    if rows == 1:
        return torch.zeros(shape, device="meta")
    return torch.zeros(rows, *shape[1:], device="meta")


def denoiser_flops(config: Mapping[str, Any], height: int, width: int, tokens: int = 77) -> float:
    """FLOPs of one forward of a denoiser on one latent image.

    SDXL at 128 x 128: 6.76e12; SD1.5 at 64 x 64: 0.80e12.

    Args:
        config: of a denoiser of any family.
        height: of the latents.
        width: of the latents.
        tokens: of the prompt.
    """
    return _counted_forward(json.dumps(dict(config), sort_keys=True), height, width, tokens)


@functools.lru_cache(maxsize=64)
def _counted_forward(config_json: str, height: int, width: int, tokens: int) -> float:
    """`denoiser_flops` of a config as JSON: a run asks more than once, and counting takes long."""
    denoiser = meta_denoiser(json.loads(config_json))
    inputs = denoiser_inputs(denoiser.config, height, width, tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(**inputs)
    return float(counter.get_total_flops())


def encoder_flops(config: Mapping[str, Any], height: int, width: int) -> float:
    """FLOPs of encoding one image with an `AutoencoderKL`. SDXL's at 1024 x 1024: 4.88e12.

    Args:
        config: the autoencoder's config.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL.from_config(dict(config)).encode(torch.zeros(1, 3, height, width))
    return float(counter.get_total_flops())


def dpo_step_flops(
    forward_flops: float,
    pairs: int,
    method: str,
    checkpointing: bool = False,
    stored_reference: bool = False,
    encoder: float = 0.0,
) -> float:
    """FLOPs of one optimiser step of Diffusion-DPO. The text encoders (under 2 %) are not counted.

    Args:
        forward_flops: of one forward of the denoiser on one image.
        pairs: of the step; each has two images.
        method: `full` or `lora`.
        checkpointing: gradient checkpointing, which repeats the forward.
        stored_reference: the reference's errors are known, so that it is not evaluated.
        encoder: FLOPs of encoding one image, where the autoencoder runs in the loop.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in BACKWARD_COST:
        raise ValueError(f"method must be lora or full, not {method!r}")
    reference = 0 if stored_reference else 1
    recomputed = 1 if checkpointing else 0
    forwards = reference + 1 + BACKWARD_COST[method] + recomputed
    return 2 * pairs * (forwards * forward_flops + encoder)


def gpu_hours(seconds: float, devices: int) -> float:
    """Device-hours of a run that held `devices` devices for `seconds` of wall-clock time."""
    return seconds * devices / 3600


@dataclass(frozen=True)
class Savings:
    """What n models cost, aligned from scratch, and as one anchor realigned n - 1 times.

    Attributes:
        from_scratch: cost of all n models.
        anchor: cost of the one that is trained.
        saved: the difference.
        percent: the difference as a share of `from_scratch`.
    """

    from_scratch: float
    anchor: float
    saved: float
    percent: float


def savings(anchor: float, others: Sequence[float]) -> Savings:
    """Training cost that is saved by realigning one anchor instead of training `others`, too.

    Sampling is not counted: mode `exact` evaluates two denoisers a step where a model that was
    aligned from scratch evaluates one.

    Args:
        anchor: cost of the anchor, in any unit (GPU-hours, FLOPs).
        others: costs of the models that need not be trained.
    """
    total = anchor + sum(others)
    percent = 100 * (total - anchor) / total if total else 0.0
    return Savings(from_scratch=total, anchor=anchor, saved=total - anchor, percent=percent)
