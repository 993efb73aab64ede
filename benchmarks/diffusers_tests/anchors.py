"""Anchors of a pipeline under test: other weights for its denoisers, and a LoRA, on disk."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK = 4
ALPHA = 8.0
SCALE = 0.1
"""How far a full anchor's weights are from the reference's, in spreads of each tensor."""

LORA_SCALE = 0.2
"""Standard deviation of a LoRA's weights."""

LORA_LAYERS = 24
"""The most layers that get a LoRA, spread over the network."""

ATTENTION = r"attn|attention|to_[qkv]|qkv|_proj"
"""What the name of a layer holds that gets a LoRA."""

Weights = dict[str, Tensor]


@dataclass
class SavedAnchor:
    """An anchor on disk, and what a stock pipeline has of it.

    Attributes:
        folder: that `realign` is given.
        networks: the stock networks of the aligned model, by the attribute of the denoiser.
        weights: for the reference's own networks, which make them the aligned model's.
    """

    folder: str
    networks: dict[str, nn.Module]
    weights: dict[str, Weights]


def full_anchor(networks: Mapping[str, nn.Module], folder: Path) -> SavedAnchor:
    """An anchor whose weights differ from the reference's everywhere, as diffusers saves it.

    Args:
        networks: the reference's, by the attribute of the denoiser.
        folder: where it is saved.
    """
    aligned: dict[str, nn.Module] = {}
    weights = {}
    for number, (name, network) in enumerate(networks.items()):
        moved: Any = copy.deepcopy(network)
        generator = torch.Generator().manual_seed(1 + number)
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                spread = parameter.detach().float().std(unbiased=False).clamp(min=0.05)
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += (SCALE * spread * noise).to(parameter.dtype)
        moved.save_pretrained(folder / name)
        # As users load it: where the weights lie in memory may change the last bits of a product.
        aligned[name] = type(network).from_pretrained(folder, subfolder=name).eval()
        weights[name] = moved.state_dict()
    return SavedAnchor(str(folder), aligned, weights)


def lora_anchor(pipe: Any, name: str, folder: Path) -> SavedAnchor:
    """A LoRA on the layers of attention, in the pipeline's format; in peft's where it has none.

    Args:
        pipe: the pipeline.
        name: the attribute of its denoiser.
        folder: where it is saved.
    """
    network = getattr(pipe, name)
    adapted = copy.deepcopy(network)
    linear = [path for path, layer in adapted.named_modules() if isinstance(layer, nn.Linear)]
    targets = [path for path in linear if re.search(ATTENTION, path)] or linear
    stride = 1 + (len(targets) - 1) // LORA_LAYERS
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets[::stride])
    adapted.add_adapter(config, adapter_name="default")
    generator = torch.Generator().manual_seed(3)
    for path, parameter in adapted.named_parameters():
        if "lora_" in path:
            parameter.data = LORA_SCALE * torch.randn(parameter.shape, generator=generator)
    adapted.eval()
    state = {}
    for key, value in get_peft_model_state_dict(adapted, adapter_name="default").items():
        state[key] = value.contiguous()
    settings = adapted.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    file, prefix = _save_lora(pipe, name, state, settings, folder)
    # As pipelines load it, for the same reason as above: it stays where the file has it.
    loaded = copy.deepcopy(network)
    loaded.load_lora_adapter(
        load_file(folder / file),
        prefix=prefix,
        metadata={f"{prefix}.{key}": value for key, value in settings.items()},
        low_cpu_mem_usage=True,
    )
    return SavedAnchor(str(folder), {name: loaded.eval()}, {name: _merged(network, adapted)})


def _save_lora(
    pipe: Any, name: str, state: dict[str, Tensor], config: dict[str, Any], folder: Path
) -> tuple[str, str]:
    """Save an adapter of a network; returns the file's name and the prefix of its layers."""
    saver = getattr(type(pipe), "save_lora_weights", None)
    parameters = inspect.signature(saver).parameters if saver else {}
    folder.mkdir(parents=True)
    if saver is not None and f"{name}_lora_layers" in parameters:
        options = {f"{name}_lora_layers": state}
        if f"{name}_lora_adapter_metadata" in parameters:
            options[f"{name}_lora_adapter_metadata"] = config
        saver(folder, **options)
        return "pytorch_lora_weights.safetensors", name
    file, prefix = "adapter_model.safetensors", "base_model.model"
    save_file({f"{prefix}.{key}": value for key, value in state.items()}, folder / file)
    keys = ("peft_type", "r", "lora_alpha", "target_modules", "bias")
    settings = {key: config[key] for key in keys}
    (folder / "adapter_config.json").write_text(json.dumps(settings, default=str))
    return file, prefix


def _merged(network: nn.Module, adapted: nn.Module) -> Weights:
    """The weights of a network with its LoRA added to them."""
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    for path, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer):
            delta: Any = layer.get_delta_weight("default")  # type: ignore[operator]
            weights[f"{path}.weight"] += delta.detach()
    return weights


def between(network: nn.Module, weights: Weights, lam: float) -> Weights:
    """The weights between a network's own and others, summed in double precision."""
    found = {}
    for key, own in network.state_dict().items():
        if own.is_floating_point():
            sum_of_both = (1 - lam) * own.double() + lam * weights[key].double()
            found[key] = sum_of_both.to(own.dtype)
        else:
            found[key] = own.clone()
    return found


@contextmanager
def in_place(network: nn.Module, weights: Weights) -> Iterator[None]:
    """A network with other weights, in the same memory."""
    own = {key: value.clone() for key, value in network.state_dict().items()}
    network.load_state_dict(weights)
    try:
        yield
    finally:
        network.load_state_dict(own)
