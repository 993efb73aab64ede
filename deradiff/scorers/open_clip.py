"""open_clip's names and configs, as transformers' CLIPModel has them. The conversion is exact: a
renaming, a split and two transposes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

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

# What a config may say. Any other key that is switched on (a ResNet, a timm tower, another pooling)
# would change the network.
_KNOWN = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}

_PARTS = {
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

_IN_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.": ".self_attn.",
}


def read_model_config(path: str) -> dict[str, Any]:
    """An open_clip model config from a json file: the bare one, or the hub's
    `open_clip_config.json` around it. Raises ValueError."""
    try:
        config = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_config={path} is no readable json file ({error}); give an open_clip model "
            f"config"
        ) from error
    return config.get("model_cfg", config)


def _refuse_what_is_not_a_plain_vit(config: dict[str, Any]) -> None:
    for part, known in _KNOWN.items():
        section = config.get(part) if part else config
        if not isinstance(section, dict):
            raise ValueError(
                f"the open_clip model config has no {part}; give one such as open_clip's own "
                f"ViT-H-14.json"
            )
        strange = [key for key, value in section.items() if value and key not in known]
        if strange:
            raise ValueError(
                f"the open_clip model config sets {', '.join(strange)}: only plain ViT models, "
                f"without it, can be loaded"
            )


def clip_config(config: dict[str, Any], eos_token_id: int) -> CLIPConfig:
    """The CLIPConfig of an open_clip model config. Raises ValueError for a missing size and for
    what is not a plain ViT CLIP."""
    _refuse_what_is_not_a_plain_vit(config)
    try:
        vision, text = _tower(config["vision_cfg"]), _tower(config["text_cfg"])
        vision |= {key: config["vision_cfg"][key] for key in ("image_size", "patch_size")}
        vision["num_attention_heads"] = vision["hidden_size"] // config["vision_cfg"].get(
            "head_width", 64
        )
        text |= {
            "vocab_size": config["text_cfg"]["vocab_size"],
            "max_position_embeddings": config["text_cfg"]["context_length"],
        }
        text["num_attention_heads"] = config["text_cfg"]["heads"]
        # quick_gelu is a property of the weights (OpenAI's have it) that no shape shows; without
        # it, as for ViT-H-14, the gelu is exact
        activation = {"hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu"}
        special = {"eos_token_id": eos_token_id, "bos_token_id": None, "pad_token_id": None}
        return CLIPConfig(
            projection_dim=config["embed_dim"],
            vision_config=vision | activation,
            text_config=text | activation | special,
        )
    except KeyError as missing:
        raise ValueError(
            f"the open_clip model config has no {missing.args[0]}; give one such as open_clip's "
            f"own ViT-H-14.json"
        ) from missing


def _tower(section: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(section["layers"], int):
        raise ValueError(
            "the open_clip model config describes a ResNet (layers is a list): only ViT models "
            "can be loaded"
        )
    width = section["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * section.get("mlp_ratio", 4.0)),
        "num_hidden_layers": section["layers"],
    }


def _renamed(name: str) -> str:
    part = next((part for part in _PARTS if name.startswith(part)), "")
    name = _PARTS.get(part, "") + name.removeprefix(part)
    for theirs, ours in _IN_BLOCK.items():
        name = name.replace(theirs, ours)
    return name


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under CLIPModel's names; what it does not know keeps its name. Meta
    tensors convert as well."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(
            ("in_proj_weight", "in_proj_bias")
        ):  # (3C, ...): query, key and value in one
            stem, _, kind = _renamed(name).rpartition("in_proj_")
            converted |= {
                f"{stem}{letter}_proj.{kind}": third
                for letter, third in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:  # their projections multiply from the right
            converted[_renamed(name)] = (
                tensor.T if name in ("visual.proj", "text_projection") else tensor
            )
    return converted
