"""LoRA files of any trainer, read into one form.

They come from diffusers (with old and new names), peft (Flow-GRPO), kohya, and TRL, which writes
diffusers' files.

A LoRA changes a weight W to W + s B A, where s is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
Where a format keeps alpha, the s of each layer is the one that its trainer had.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deradiff.models.families import family_of
from deradiff.models.family import Family, unwrapped

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

LAYER_SETTINGS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)
"""Settings of peft's LoraConfig that say what A and B mean."""

UNSUPPORTED_SETTINGS = (
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
)
"""Settings of peft's LoraConfig that change more than A and B do."""

MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract something from the base's own weights."""

LAYER_PARTS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
)
"""How the names of a LoRA's tensors end, in peft's names."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA in the form that diffusers' `load_lora_adapter` takes.

    Attributes:
        state: tensors by `<denoiser>.<layer>.lora_A.weight` and so on; A is (rank, in, ...), B is
            (out, rank, ...).
        metadata: peft's LoraConfig by `<denoiser>.<setting>`; None: alpha is the rank.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any] | None


def read_lora(file: Path, config: dict[str, Any] | None, pipe: Any, name: str) -> LoraWeights:
    """Read a LoRA for the denoiser of a pipeline.

    Args:
        file: the safetensors file.
        config: the content of peft's `adapter_config.json`; None: there is none.
        pipe: the pipeline.
        name: how an error names the anchor.

    Raises:
        ValueError: for a file that is not a LoRA on that denoiser alone.
    """
    family = family_of(pipe)
    if config is not None:
        check_config(config, name)
        state = {}
        for key, value in load_file(file).items():
            state[f"{family.denoiser}.{key.removeprefix(PEFT_PREFIX)}"] = value
    else:
        state, config = _read_by_diffusers(file, pipe, name)

    state = _only_denoiser(state, family, name)
    unknown = [key for key in state if not key.endswith(LAYER_PARTS)]
    if unknown:
        raise ValueError(
            f"{name} holds {unknown[0]}, which is no part of a LoRA: realign reads LoRA (and DoRA) "
            "layers alone"
        )
    if not state:
        raise ValueError(
            f"{name} holds no LoRA layer of the {family.name} pipeline's {family.denoiser}: give a "
            "LoRA that was trained on one"
        )
    if config is None:
        return LoraWeights(state, None)
    return LoraWeights(state, _metadata(state, config, f"{family.denoiser}."))


def check_config(config: dict[str, Any], name: str) -> None:
    """Check that a config of peft means a LoRA beside unchanged weights, and nothing else.

    Args:
        config: the content of `adapter_config.json`.
        name: how an error names the anchor.

    Raises:
        ValueError: where it means more.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"{name} is a {config['peft_type']} adapter of peft, and realign reads LoRA: give a "
            "LoRA, or full weights"
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(MOVES_BASE):
        raise ValueError(
            f"{name} began as {start}, which changes the base's own weights: convert it to a plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion) or give the "
            "merged network"
        )
    unsupported = [key for key in UNSUPPORTED_SETTINGS if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise ValueError(
            f"{name} changes more than its LoRA layers ({unsupported[0]} in its config): give the "
            "merged network as an anchor"
        )


def keys_of(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file. No tensor is read."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _metadata(state: dict[str, Tensor], config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What a LoraConfig has to say of these layers, by `<denoiser>.<setting>`."""
    layers = {key.rpartition(".lora_")[0].removeprefix(prefix) for key in state}
    settings = {key: config[key] for key in LAYER_SETTINGS if config.get(key) is not None}
    settings["target_modules"] = sorted(layers)
    return {f"{prefix}{key}": value for key, value in settings.items()}


def _read_by_diffusers(
    file: Path, pipe: Any, name: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a LoRA with the pipeline's own loader.

    Returns:
        Tensors in peft's names, and the settings of a LoraConfig; None: alpha is the rank.
    """
    family = family_of(pipe)
    denoiser = unwrapped(getattr(pipe, family.denoiser))
    keys = keys_of(file)
    if any("dora_scale" in key for key in keys):
        raise ValueError(
            f"{name} is a DoRA in kohya's or LyCORIS' names, whose norm diffusers would drop: save "
            "it in peft's names"
        )
    has_peft_prefix = any(key.startswith(PEFT_PREFIX) for key in keys)
    if has_peft_prefix and not family.reads_peft_prefix:
        raise ValueError(
            f"{name} is a LoRA of peft, whose scale stands in its {PEFT_CONFIG}: put that file "
            "beside it"
        )
    try:
        # Some families return (state, metadata), others (state, alphas, metadata).
        state, *alphas, metadata = pipe.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            unet_config=denoiser.config,
            return_alphas=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{name} is no LoRA that diffusers can read for the {family.name} pipeline ({reason})"
        ) from error

    prefix = f"{family.denoiser}."
    state = _peft_names(_with_prefix(state, prefix, denoiser))
    if metadata:
        config = {}
        for key, value in metadata.items():
            if key.startswith(prefix):
                config[key.removeprefix(prefix)] = value
        check_config(config, name)
        return state, config
    if alphas and alphas[0]:
        return state, _config_of(state, alphas[0], prefix)
    return state, None


def _with_prefix(state: dict[str, Tensor], prefix: str, denoiser: nn.Module) -> dict[str, Tensor]:
    """The tensors with the denoiser in their names.

    Files of diffusers' first LoRA scripts (`save_attn_procs`) name the layers without it.
    """
    children = {name for name, _ in denoiser.named_children()}
    prefixed = {}
    for key, value in state.items():
        is_bare = key.split(".")[0] in children
        prefixed[f"{prefix}{key}" if is_bare else key] = value
    return prefixed


def _peft_names(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors in peft's names."""
    if any("lora_A" in key for key in state):
        return state
    return convert_unet_state_dict_to_peft(state)


def _config_of(state: dict[str, Tensor], alphas: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The settings of a LoraConfig where each layer has a scale of its own.

    diffusers itself loses the scales of attention layers that differ from one another.

    Args:
        state: tensors in peft's names.
        alphas: by `<layer>.alpha` or `<layer's down weight>.alpha`, in diffusers' names.
        prefix: of the layers' names in `state`.
    """
    # The alphas by the name of the layer's A in peft.
    down_alphas = {}
    for key, alpha in alphas.items():
        layer = key.removesuffix(".alpha")
        is_weight = layer.endswith(".weight")
        down_alphas[layer if is_weight else f"{layer}.lora.down.weight"] = float(alpha)
    down_alphas = _peft_names(down_alphas)

    # Rank and alpha of each layer; without an alpha it is the rank.
    layer_ranks = {}
    layer_alphas = {}
    for key, value in state.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            layer_ranks[layer] = value.shape[0]
            layer_alphas[layer] = down_alphas.get(key, float(value.shape[0]))

    # A LoraConfig has one value, and a pattern for each layer with another one.
    rank = _most_common(layer_ranks)
    alpha = _most_common(layer_alphas)
    return {
        "r": rank,
        "rank_pattern": _exceptions(layer_ranks, rank, prefix),
        "lora_alpha": alpha,
        "alpha_pattern": _exceptions(layer_alphas, alpha, prefix),
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exceptions(values: dict[str, Any], common: Any, prefix: str) -> dict[str, Any]:
    """The layers whose value is not the common one, by the pattern that peft finds them with."""
    patterns = {}
    for layer, value in values.items():
        if value != common:
            patterns[f"^{layer.removeprefix(prefix)}"] = value
    return patterns


def _only_denoiser(state: dict[str, Tensor], family: Family, name: str) -> dict[str, Tensor]:
    """The denoiser's part of a LoRA. Raises ValueError where there is another part with an effect.

    Weights on the text encoders are dropped if they are all zero. Otherwise both networks would get
    other embeddings, which mixing their outputs does not see.
    """
    text: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("text_encoder", "lora_te")):
            text[key] = value
        else:
            rest[key] = value

    # A part has no effect where its B is zero.
    for key, value in text.items():
        is_down = ".lora_A." in key or ".down." in key
        if not is_down and value.any():
            raise ValueError(
                f"{name} also changes the text encoder ({next(iter(text))}), and realign mixes "
                f"what the {family.denoiser} says: give a LoRA on the {family.denoiser} alone"
            )
    for key in rest:
        if not key.startswith(f"{family.denoiser}."):
            raise ValueError(
                f"{name} does not bind to the {family.name} pipeline's {family.denoiser} ({key}): "
                "give an anchor of its family"
            )
    return rest
