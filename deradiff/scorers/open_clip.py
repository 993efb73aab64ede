"""From open_clip's names and configs to those of transformers' CLIPModel.

The conversion is exact: a renaming, a split and two transposes.

Shapes: C channels of a tower, D of the space that both towers share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

from deradiff.text_files import read_json

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 1024,
        "heads": 16,
        "layers": 24,
    },
}
"""open_clip's config of ViT-H-14."""

EXAMPLE = "open_clip's own ViT-H-14.json"

HEAD_WIDTH = 64
"""Channels of an attention head of the image tower, where the config does not say."""

MLP_RATIO = 4.0
"""Width of a block's hidden layer over the tower's, where the config does not say."""

# The keys that a config may set. Any other key that is switched on (a ResNet, a timm tower, another
# pooling) would change the network.
_KNOWN_KEYS = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}

# How a tensor's name begins, in open_clip and in CLIPModel (whose `pre_layrnorm` is no misprint
# here).
_PREFIXES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}

# Names inside a transformer block.
_IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}

# Projections (C, D) that multiply from the right; CLIPModel's linear layers hold (D, C).
_FROM_THE_RIGHT = ("visual.proj", "text_projection")


def read_model_config(path: str) -> dict[str, Any]:
    """Read an open_clip model config.

    Args:
        path: a JSON file: the bare config, or the hub's `open_clip_config.json` around it.

    Returns:
        The bare config.

    Raises:
        ValueError: where the file is missing or is no JSON.
    """
    try:
        config = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_config={path} is no readable json file ({error}); give an open_clip model "
            "config"
        ) from error
    return config.get("model_cfg", config)


def clip_config(config: dict[str, Any], eos_token_id: int) -> CLIPConfig:
    """The CLIPConfig of an open_clip model config.

    Args:
        config: a bare open_clip model config.
        eos_token_id: of the tokenizer; the text vector is read at this token.

    Raises:
        ValueError: where a size is missing, and for a model that is no plain ViT.
    """
    _refuse_other_networks(config)
    try:
        vision = _vision_settings(config["vision_cfg"])
        text = _text_settings(config["text_cfg"], eos_token_id)
        projection_dim = config["embed_dim"]
    except KeyError as missing:
        raise ValueError(
            f"the open_clip model config has no {missing.args[0]}; give one such as {EXAMPLE}"
        ) from missing

    # The activation belongs to the weights (OpenAI's have quick_gelu), and no shape shows it.
    # Without the key, as for ViT-H-14, the gelu is exact.
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=projection_dim,
        vision_config=vision | {"hidden_act": activation},
        text_config=text | {"hidden_act": activation},
    )


def _refuse_other_networks(config: dict[str, Any]) -> None:
    """Raises ValueError for a config that sets what a plain ViT does not have."""
    for name, known_keys in _KNOWN_KEYS.items():
        section = config.get(name) if name else config
        if not isinstance(section, dict):
            raise ValueError(
                f"the open_clip model config has no {name}; give one such as {EXAMPLE}"
            )
        strange = [key for key, value in section.items() if value and key not in known_keys]
        if strange:
            raise ValueError(
                f"the open_clip model config sets {', '.join(strange)}: only plain ViT models, "
                "without it, can be loaded"
            )


def _vision_settings(section: dict[str, Any]) -> dict[str, Any]:
    """The image tower's settings of a CLIPConfig. Raises KeyError for a missing size."""
    settings = _tower_settings(section)
    settings["image_size"] = section["image_size"]
    settings["patch_size"] = section["patch_size"]
    settings["num_attention_heads"] = section["width"] // section.get("head_width", HEAD_WIDTH)
    return settings


def _text_settings(section: dict[str, Any], eos_token_id: int) -> dict[str, Any]:
    """The text tower's settings of a CLIPConfig. Raises KeyError for a missing size."""
    settings = _tower_settings(section)
    settings["vocab_size"] = section["vocab_size"]
    settings["max_position_embeddings"] = section["context_length"]
    settings["num_attention_heads"] = section["heads"]
    settings["eos_token_id"] = eos_token_id
    settings["bos_token_id"] = None
    settings["pad_token_id"] = None
    return settings


def _tower_settings(section: dict[str, Any]) -> dict[str, Any]:
    """What both towers have. Raises KeyError for a missing size, ValueError for a ResNet."""
    if not isinstance(section["layers"], int):
        raise ValueError(
            "the open_clip model config describes a ResNet (layers is a list): only ViT models "
            "can be loaded"
        )
    width = section["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * section.get("mlp_ratio", MLP_RATIO)),
        "num_hidden_layers": section["layers"],
    }


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring an open_clip state dict under CLIPModel's names.

    Args:
        state: under open_clip's names; tensors on the device `meta` convert as well.

    Returns:
        The same tensors. One that is unknown keeps its name.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new_name = _rename(name)
        if name.endswith(("in_proj_weight", "in_proj_bias")):
            # Query, key and value in one, (3C, ...).
            stem, _, kind = new_name.rpartition("in_proj_")
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{stem}{letter}_proj.{kind}"] = third
        elif name in _FROM_THE_RIGHT:
            converted[new_name] = tensor.T
        else:
            converted[new_name] = tensor
    return converted


def _rename(name: str) -> str:
    """CLIPModel's name of a tensor of open_clip's; an unknown name stays as it is."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    new_name = _PREFIXES.get(prefix, "") + name.removeprefix(prefix)
    for theirs, ours in _IN_BLOCK.items():
        new_name = new_name.replace(theirs, ours)
    return new_name
