"""LoRA files of any trainer, read into one form: diffusers (old and new names), peft (Flow-GRPO), kohya, and TRL, which writes diffusers'.

A LoRA is W + s B A with s = alpha / rank (or alpha / sqrt(rank)). Where a format keeps alpha, each layer's s is what its trainer had.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from deradiff.models.families import family_of
from deradiff.models.family import Family, unwrapped

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
SCALE = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)  # of peft's LoraConfig: what A and B mean
BEYOND = (
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
)  # of it: more than A and B
MOVES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # initialisations that subtract from the weights that the LoRA is added to
PARTS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
)


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as `load_lora_adapter` of diffusers takes it, keys below the denoiser's name.

    state: `<denoiser>.<layer>.lora_A.weight` and so on. metadata: peft's LoraConfig by `<denoiser>.<key>`; None where alpha is the rank.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any] | None


def read_lora(file: Path, config: dict[str, Any] | None, pipe: Any, named: str) -> LoraWeights:
    """Read a LoRA for the denoiser of `pipe`. config: peft's `adapter_config.json`, where there is one. named: the anchor, in errors.

    Raises ValueError, in one sentence, for what is no LoRA on that denoiser alone.
    """
    family = family_of(pipe)
    if config is not None:
        check_config(config, named)
        state = {
            f"{family.denoiser}.{key.removeprefix(PEFT_PREFIX)}": value
            for key, value in load_file(file).items()
        }
    else:
        state, config = _by_diffusers(file, pipe, named)
    state = _on_denoiser_alone(state, family, named)
    strange = [key for key in state if not key.endswith(PARTS)]
    if strange:
        raise ValueError(
            f"{named} holds {strange[0]}, which is no part of a LoRA: realign reads LoRA (and DoRA) layers alone"
        )
    if not state:
        raise ValueError(
            f"{named} holds no LoRA layer of the {family.name} pipeline's {family.denoiser}: give a LoRA that was trained on one"
        )
    if config is None:
        return LoraWeights(state, None)
    layers = sorted(
        {key.rpartition(".lora_")[0].removeprefix(f"{family.denoiser}.") for key in state}
    )
    kept = {key: config[key] for key in SCALE if config.get(key) is not None} | {
        "target_modules": layers
    }
    return LoraWeights(state, {f"{family.denoiser}.{key}": value for key, value in kept.items()})


def check_config(config: dict[str, Any], named: str) -> None:
    """ValueError for a peft config that means more than a LoRA beside unchanged weights."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"{named} is a {config['peft_type']} adapter of peft, and realign reads LoRA: give a LoRA, or full weights"
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(MOVES_BASE):
        raise ValueError(
            f"{named} began as {start}, which changes the base's own weights: convert it to a plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion) or give the merged network"
        )
    beyond = [key for key in BEYOND if config.get(key)] + (
        ["bias"] if config.get("bias", "none") != "none" else []
    )
    if beyond:
        raise ValueError(
            f"{named} changes more than its LoRA layers ({beyond[0]} in its config): give the merged network as an anchor"
        )


def _by_diffusers(
    file: Path, pipe: Any, named: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """State in peft's names, and what a LoraConfig is to say of it, by the pipeline's own loader of safetensors."""
    denoiser = unwrapped(getattr(pipe, family_of(pipe).denoiser))
    keys = keys_of(file)
    if any("dora_scale" in key for key in keys):
        raise ValueError(
            f"{named} is a DoRA in kohya's or LyCORIS' names, whose norm diffusers would drop: save it in peft's names"
        )
    if any(key.startswith(PEFT_PREFIX) for key in keys) and not family_of(pipe).reads_peft_prefix:
        raise ValueError(
            f"{named} is a LoRA of peft, whose scale stands in its {PEFT_CONFIG}: put that file beside it"
        )
    try:
        read = pipe.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            unet_config=denoiser.config,
            return_alphas=True,
            return_lora_metadata=True,
        )
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{named} is no LoRA that diffusers can read for the {family_of(pipe).name} pipeline ({said})"
        ) from error
    state, metadata = _peft_names(_below(denoiser, family_of(pipe).denoiser, read[0])), read[-1]
    alphas = read[1] if len(read) == 3 else None
    if metadata:
        prefix = f"{family_of(pipe).denoiser}."
        config = {
            key.removeprefix(prefix): value
            for key, value in metadata.items()
            if key.startswith(prefix)
        }
        check_config(config, named)
        return state, config
    return state, _config_of(state, alphas, f"{family_of(pipe).denoiser}.") if alphas else None


def keys_of(file: Path) -> list[str]:
    """The names in a safetensors file; no tensor is read."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _below(denoiser: nn.Module, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files of diffusers' first LoRA scripts (`save_attn_procs`) name the layers without the network."""
    children = {name for name, _ in denoiser.named_children()}
    return {
        f"{prefix}.{key}" if key.split(".")[0] in children else key: value
        for key, value in state.items()
    }


def _peft_names(state: dict[str, Any]) -> dict[str, Any]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    return (
        state if any("lora_A" in key for key in state) else convert_unet_state_dict_to_peft(state)
    )


def _config_of(state: dict[str, Tensor], alphas: dict[str, Any], prefix: str) -> dict[str, Any]:
    """peft's config for a scale of each layer's own: diffusers itself loses those of attention layers where they differ.

    alphas: by diffusers' names, old ones too, `<layer>.alpha` or `<layer's down weight>.alpha`.
    """
    downs = {key.removesuffix(".alpha"): float(alpha) for key, alpha in alphas.items()}
    downs = _peft_names(
        {
            key if key.endswith(".weight") else f"{key}.lora.down.weight": alpha
            for key, alpha in downs.items()
        }
    )
    ranks = {
        key.removesuffix(".lora_A.weight"): value.shape[0]
        for key, value in state.items()
        if key.endswith(".lora_A.weight")
    }
    scales = {
        layer: downs.get(f"{layer}.lora_A.weight", float(rank)) for layer, rank in ranks.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, scales))
    return {
        "r": rank,
        "rank_pattern": {
            f"^{layer.removeprefix(prefix)}": r for layer, r in ranks.items() if r != rank
        },
        "lora_alpha": alpha,
        "alpha_pattern": {
            f"^{layer.removeprefix(prefix)}": a for layer, a in scales.items() if a != alpha
        },
    }


def _on_denoiser_alone(state: dict[str, Tensor], family: Family, named: str) -> dict[str, Tensor]:
    """The denoiser's part. A part on the text encoders is let go where it does nothing, and else refused: it would change what both
    networks are told, which mixing their outputs does not see."""
    texts = {
        key: value for key, value in state.items() if key.startswith(("text_encoder", "lora_te"))
    }
    if any(
        value.any() for key, value in texts.items() if ".lora_A." not in key and ".down." not in key
    ):
        raise ValueError(
            f"{named} also changes the text encoder ({next(iter(texts))}), and realign mixes what the {family.denoiser} says: "
            f"give a LoRA on the {family.denoiser} alone"
        )
    rest = {key: value for key, value in state.items() if key not in texts}
    foreign = next((key for key in rest if not key.startswith(f"{family.denoiser}.")), None)
    if foreign:
        raise ValueError(
            f"{named} does not bind to the {family.name} pipeline's {family.denoiser} ({foreign}): give an anchor of its family"
        )
    return rest
