"""LoRA files of any trainer, read into one form.

They come from diffusers (with old and new names), peft (Flow-GRPO), kohya, ComfyUI and TRL, which
writes diffusers' files. diffusers itself converts the names: each pipeline class has its own way.

A LoRA changes a weight W to W + s B A, where s is alpha / rank, or alpha / sqrt(rank) with rsLoRA.
Where a format keeps alpha, the s of each layer is the one that its trainer had.

Shapes: A is (rank, in, ...) and B (out, rank, ...), with the axes of a convolution's kernel last.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from deradiff.anchors.float8 import plain_weights
from deradiff.anchors.layer_settings import DEFAULT, LayerPatterns, check_alpha, check_rank
from deradiff.anchors.locations import PEFT_CONFIG
from deradiff.anchors.traced import plain, traced_state, unused_names
from deradiff.anchors.weight_files import check_values, read_metadata, read_tensors
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import denoiser_name, pipeline_label
from deradiff.text_files import parse_json

PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

SWITCHES = ("use_rslora", "use_dora", "lora_bias")
"""Settings of peft's LoraConfig that say what A and B mean, besides their ranks and alphas."""

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

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Where diffusers writes peft's LoraConfig, as JSON in the header of a safetensors file."""

TEXT_STARTS = ("text_encoder", "lora_te", "text_model", "conditioner.", "cond_stage_model.")
"""How names of tensors begin that belong to a text encoder, in all formats."""

ZERO_ENDINGS = (".diff", ".diff_b")
"""Whole weights and biases beside a LoRA, which trainers also write where they are zero."""

PARTNERS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), (".down.", ".up."))
"""How the names of A and B differ, in all formats."""


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


def read_lora(
    file: Path,
    config: dict[str, Any] | None,
    pipe: Any,
    name: str,
    denoiser: str | None = None,
) -> LoraWeights:
    """Read a LoRA for the denoiser of a pipeline.

    Args:
        file: the file; a pickle is one that the user allows.
        config: the content of peft's `adapter_config.json`; None: there is none.
        pipe: any diffusers pipeline.
        name: how an error names the anchor.
        denoiser: the pipeline's attribute that the LoRA is for; None: the first of
            `deradiff.models.pipelines.DENOISER_NAMES`.

    Raises:
        ValueError: for a file that is not a LoRA on that denoiser alone.
    """
    target = _Target(pipe, denoiser or denoiser_name(pipe))
    metadata = read_metadata(file)
    tensors = plain_weights(read_tensors(file, name), metadata, torch.float32, name)
    check_values(tensors, name)
    tensors = _without_adapter_name(_without_zeros(tensors))
    tensors = _without_text_encoders(tensors, target, name)
    if config is not None:
        check_config(config, name)
        state = _named_by_peft(tensors, target)
    else:
        state, config = _named_by_diffusers(tensors, metadata, target, name)

    state = _only_denoiser(state, target, name)
    unknown = [key for key in state if not key.endswith(LAYER_PARTS)]
    if unknown:
        raise ValueError(
            f"{name} holds {_listed(unknown)}, which is no part of a LoRA: realign reads LoRA (and "
            "DoRA) layers alone"
        )
    if not state:
        raise ValueError(
            f"{name} holds no LoRA layer of {target.pipeline}'s {target.denoiser}: "
            "give a LoRA that was trained on one"
        )
    state = _in_the_shape_of_layers(state, target, name)
    _check_pairs(state, name)
    state = _with_all_biases(state)
    if config is None:
        return LoraWeights(state, None)
    return LoraWeights(state, _metadata(state, config, target.prefix, name))


class _Target:
    """The denoiser that a LoRA is read for.

    Attributes:
        pipe: the pipeline.
        denoiser: its attribute.
        network: the denoiser itself.
        prefix: of the names of its layers.
        pipeline: how errors name the pipeline.
    """

    def __init__(self, pipe: Any, denoiser: str) -> None:
        self.pipe = pipe
        self.denoiser = denoiser
        self.network: Any = unwrapped(getattr(pipe, denoiser))
        self.prefix = f"{denoiser}."
        self.pipeline = f"the {pipeline_label(pipe)} pipeline"

    @property
    def loader_prefix(self) -> str:
        """The prefix that diffusers' loader gives the denoiser's layers, such as `transformer.`.

        A second denoiser gets its LoRA from a file that names the first one.
        """
        names = getattr(self.pipe, "_lora_loadable_modules", [self.denoiser])
        if self.denoiser in names and not self.denoiser.endswith("_2"):
            return self.prefix
        return f"{denoiser_name(self.pipe)}."


def check_config(config: dict[str, Any], name: str) -> None:
    """Check that a config of peft means a LoRA beside unchanged weights, and nothing else.

    Args:
        config: the content of `adapter_config.json`.
        name: how an error names the anchor.

    Raises:
        ValueError: where it means more.
    """
    kind = str(config.get("peft_type", "LORA"))[:40]
    if kind != "LORA":
        raise ValueError(
            f"{name} is a {kind} adapter of peft, and realign reads LoRA: give a LoRA, or full "
            "weights"
        )
    start = config.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else ""
    if start.startswith(MOVES_BASE):
        raise ValueError(
            f"{name} began as {start}, which changes the base's own weights: convert it to a plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion) or give the "
            "merged network"
        )
    for key in SWITCHES:
        if not isinstance(config.get(key), bool | None):
            raise ValueError(
                f"{name} has {key}={reprlib.repr(config[key])} in its config, which is neither "
                "true nor false"
            )
    unsupported = [key for key in UNSUPPORTED_SETTINGS if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise ValueError(
            f"{name} changes more than its LoRA layers ({unsupported[0]} in its config): give the "
            "merged network as an anchor"
        )


def _metadata(
    state: dict[str, Tensor], config: dict[str, Any], prefix: str, name: str
) -> dict[str, Any]:
    """What a LoraConfig has to say of these layers, by `<denoiser>.<setting>`.

    Raises ValueError where the config says another rank than the matrices have.
    """
    ranks = {}
    for key, value in state.items():
        if key.endswith(".lora_A.weight"):
            ranks[key.removesuffix(".lora_A.weight").removeprefix(prefix)] = value.shape[0]

    # The rank and the alpha that the config says of each layer.
    rank_patterns = LayerPatterns(config.get("rank_pattern"), "rank_pattern", name)
    alpha_patterns = LayerPatterns(config.get("alpha_pattern"), "alpha_pattern", name)
    alphas = {}
    for layer, rank in ranks.items():
        stated = check_rank(rank_patterns.value_of(layer, config.get("r") or DEFAULT), name)
        if stated != rank:
            raise ValueError(
                f"{name} has the rank {stated} of {layer} in its config and {rank} in its "
                "matrices: give the config that belongs to them"
            )
        alpha = config.get("lora_alpha")
        alpha = alpha_patterns.value_of(layer, DEFAULT if alpha is None else alpha)
        alphas[layer] = check_alpha(alpha, rank, name)

    settings: dict[str, Any] = _by_layer(ranks, alphas)
    settings |= {key: config[key] for key in SWITCHES if config.get(key) is not None}
    layers = {key.rpartition(".lora_")[0].removeprefix(prefix) for key in state}
    settings["target_modules"] = sorted(layers)
    return {f"{prefix}{key}": value for key, value in settings.items()}


def _without_zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without whole weights and biases that change nothing."""
    kept = {}
    for key, value in tensors.items():
        if not key.endswith(ZERO_ENDINGS) or value.any():
            kept[key] = value
    return kept


def _without_text_encoders(
    tensors: dict[str, Tensor], target: _Target, name: str
) -> dict[str, Tensor]:
    """The tensors without those of text encoders, of which some converters make the denoiser's.

    They are dropped where they change nothing. Otherwise both networks would get other embeddings,
    which mixing their outputs does not see: raises ValueError.
    """
    kept = {}
    for key, value in tensors.items():
        if not key.startswith(TEXT_STARTS):
            kept[key] = value
        elif not key.endswith(".alpha") and _has_effect(key, tensors):
            raise ValueError(_changes_other_part(name, "text encoder", key, target))
    return kept


def _without_adapter_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the name `default` of peft's adapter, which it removes when it saves."""
    named = {}
    for key, value in tensors.items():
        for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
            key = key.replace(f".{part}.default", f".{part}")
        named[key] = value
    return named


def _named_by_peft(tensors: Mapping[str, Tensor], target: _Target) -> dict[str, Tensor]:
    """The tensors of peft's own file, with the denoiser in their names."""
    state = {}
    for key, value in tensors.items():
        state[target.prefix + key.removeprefix(PEFT_PREFIX)] = value
    return state


def _named_by_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], target: _Target, name: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors as the pipeline's own loader names them.

    Returns:
        Tensors in peft's names, and the settings of a LoraConfig; None: alpha is the rank.
    """
    _check_format(tensors, target, name)
    if hasattr(target.pipe, "lora_state_dict"):
        converted, alphas = _converted(tensors, target, name)
    else:
        converted, alphas = dict(tensors), {}

    state = {}
    for key, value in _with_prefix(converted, target).items():
        is_denoisers = key.startswith(target.loader_prefix)
        layer = key.removeprefix(target.loader_prefix)
        state[target.prefix + layer if is_denoisers else key] = value
    state = _peft_names(state)
    config = _config_in(metadata, target)
    if config:
        check_config(config, name)
        return state, config
    if alphas:
        return state, _config_of(state, alphas, target)
    return state, None


def _check_format(tensors: Mapping[str, Tensor], target: _Target, name: str) -> None:
    """Raise ValueError for a format that diffusers would read wrongly."""
    if any("dora_scale" in key for key in tensors):
        raise ValueError(
            f"{name} is a DoRA in kohya's or LyCORIS' names, whose norm diffusers would drop: save "
            "it in peft's names"
        )
    # With the layers of diffusers' network it is peft's own file. With others it is an author's
    # layout, whose scale is in the matrices.
    children = {child for child, _ in target.network.named_children()}
    for key in tensors:
        layer = key.removeprefix(PEFT_PREFIX)
        if key != layer and layer.split(".")[0] in children:
            raise ValueError(
                f"{name} is a LoRA of peft, whose scale stands in its {PEFT_CONFIG}: put that file "
                "beside it"
            )


def _converted(
    tensors: Mapping[str, Tensor], target: _Target, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the pipeline's own loader makes of the tensors.

    Returns:
        Tensors in diffusers' or peft's names, and alphas by layer where it returns them.

    Raises:
        ValueError: where it cannot read them, or drops what has an effect.
    """
    traced = traced_state(tensors)
    try:
        # Some pipelines return (state, metadata), others (state, alphas, metadata). The metadata
        # of tensors that are passed themselves is None.
        state, *others = target.pipe.lora_state_dict(
            dict(traced),
            unet_config=target.network.config,
            return_alphas=True,
            return_lora_metadata=True,
        )
    # Converters count on the names that they know, and each fails in its own way.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{name} is no LoRA that diffusers can read for {target.pipeline} ({reason})"
        ) from error
    alphas = dict(others[0]) if len(others) > 1 and others[0] else {}
    # Some pipelines hand alphas on, and then take each for a layer.
    for key in list(state):
        if key.endswith(".alpha"):
            alphas[key] = state.pop(key)
    unused = unused_names(traced, [*state.values(), *alphas.values()])
    effective = [key for key in unused if _has_effect(key, tensors)]
    if effective:
        raise ValueError(
            f"{name} holds {_listed(effective)}, which is no part of a LoRA that diffusers reads "
            f"for {target.pipeline}: give the merged network as an anchor"
        )
    state = {key: plain(value) for key, value in state.items()}
    return state, {key: plain(value) for key, value in alphas.items()}


def _has_effect(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the network is another one without this tensor of a LoRA."""
    if key.endswith(".alpha"):
        rank = _rank_beside(key, tensors)
        return rank is not None and float(tensors[key]) != rank
    # A has one where its B is not zero.
    for down, up in PARTNERS:
        if down in key:
            key = key.replace(down, up)
    return key in tensors and bool(tensors[key].any())


def _rank_beside(alpha: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of the layer that an alpha belongs to; None: the file has no such layer."""
    layer = alpha.removesuffix("alpha")
    for key, value in tensors.items():
        if key.startswith(layer) and ("lora_A" in key or "down." in key):
            return value.shape[0]
    return None


def _config_in(metadata: Mapping[str, str], target: _Target) -> dict[str, Any]:
    """The LoraConfig in the header of a file of diffusers, for the denoiser; empty: there is none.

    A pipeline saves it with the denoiser before each setting, a network without.
    """
    try:
        settings = parse_json(metadata.get(DIFFUSERS_METADATA, "{}"), DIFFUSERS_METADATA)
    except ValueError:
        return {}
    if not isinstance(settings, dict):
        return {}
    if "r" in settings:
        return settings
    config = {}
    for key, value in settings.items():
        if key.startswith(target.loader_prefix):
            config[key.removeprefix(target.loader_prefix)] = value
    return config


def _with_prefix(state: Mapping[str, Tensor], target: _Target) -> dict[str, Tensor]:
    """The tensors with the denoiser in their names.

    Files of diffusers' first LoRA scripts (`save_attn_procs`), and of a network alone
    (`save_lora_adapter`), name the layers without it.
    """
    children = {name for name, _ in target.network.named_children()}
    prefixed = {}
    for key, value in state.items():
        is_bare = key.split(".")[0] in children
        prefixed[target.loader_prefix + key if is_bare else key] = value
    return prefixed


def _peft_names(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors in peft's names."""
    if any("lora_A" in key for key in state):
        return state
    return convert_unet_state_dict_to_peft(state)


def _config_of(state: dict[str, Tensor], alphas: dict[str, Any], target: _Target) -> dict[str, Any]:
    """The settings of a LoraConfig where each layer has a scale of its own.

    diffusers itself loses the scales of attention layers that differ from one another.

    Args:
        state: tensors in peft's names.
        alphas: by `<layer>.alpha` or `<layer's down weight>.alpha`, in diffusers' names.
        target: the denoiser, by whose prefix the layers in `state` begin.
    """
    prefix = target.prefix
    # The alphas by the name of the layer's A in peft.
    down_alphas = {}
    for key, alpha in alphas.items():
        layer = key.removesuffix(".alpha")
        is_weight = layer.endswith(".weight")
        down_alphas[layer if is_weight else f"{layer}.lora.down.weight"] = float(alpha)
    down_alphas = _peft_names(down_alphas)

    # Rank and alpha of each layer; without an alpha it is the rank.
    layer_ranks: dict[str, int] = {}
    layer_alphas: dict[str, float] = {}
    for key, value in state.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight").removeprefix(prefix)
            layer_ranks[layer] = value.shape[0]
            layer_alphas[layer] = down_alphas.get(key, float(value.shape[0]))

    return _by_layer(layer_ranks, layer_alphas)


def _by_layer(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """The settings of a LoraConfig that give each layer its rank and alpha."""
    if not ranks:
        return {}

    # A LoraConfig has one value, and a pattern for each layer with another one.
    rank = _most_common(ranks)
    alpha = _most_common(alphas)
    return {
        "r": rank,
        "rank_pattern": _exceptions(ranks, rank),
        "lora_alpha": alpha,
        "alpha_pattern": _exceptions(alphas, alpha),
    }


def _most_common(values: dict[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _exceptions(values: dict[str, Any], common: Any) -> dict[str, Any]:
    """The layers whose value is not the common one, by the pattern that peft finds them with."""
    return {f"^{layer}": value for layer, value in values.items() if value != common}


def _only_denoiser(state: dict[str, Tensor], target: _Target, name: str) -> dict[str, Tensor]:
    """The denoiser's part of a LoRA. Raises ValueError where there is another part with an effect.

    Other parts of the pipeline, such as connectors, are like text encoders.
    """
    ours: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(target.prefix):
            ours[key] = value
        else:
            others[key] = value

    components = set(getattr(target.pipe, "components", {}))
    for key in others:
        part = key.split(".")[0]
        if part not in components:
            raise ValueError(
                f"{name} does not bind to {target.pipeline}'s {target.denoiser} "
                f"({key}): give an anchor of its family"
            )
        if _has_effect(key, others):
            raise ValueError(_changes_other_part(name, part, key, target))
    return ours


def _changes_other_part(name: str, part: str, key: str, target: _Target) -> str:
    return (
        f"{name} also changes the {part} ({key}), and realign mixes what the {target.denoiser} "
        f"says: give a LoRA on the {target.denoiser} alone"
    )


def _check_pairs(state: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError for a layer that has A or B alone, or of which these have two ranks."""
    for key in state:
        layer = key.rpartition(".lora_")[0]
        down = state.get(f"{layer}.lora_A.weight")
        up = state.get(f"{layer}.lora_B.weight")
        if down is None or up is None or up.ndim < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{name} holds {key} and no A and B of that layer that fit together: it is not "
                "whole, so fetch or copy it again"
            )


def _with_all_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a bias of zero wherever B has none and that of another layer has one.

    In peft all layers of a LoRA have biases, or none has.
    """
    if not any(key.endswith(".lora_B.bias") for key in state):
        return state
    complete = dict(state)
    for key, value in state.items():
        if key.endswith(".lora_B.weight"):
            bias = key.removesuffix("weight") + "bias"
            complete.setdefault(bias, value.new_zeros(value.shape[0]))
    return complete


def _in_the_shape_of_layers(
    state: Mapping[str, Tensor], target: _Target, name: str
) -> dict[str, Tensor]:
    """The matrices with the axes of the layers that they act on.

    A convolution of 1 x 1 and a linear layer compute the same. Models have been published with
    either in the same place. Raises ValueError for another kernel than the layer's.
    """
    modules = dict(target.network.named_modules())
    shaped = {}
    for key, value in state.items():
        path, _, part = key.removeprefix(target.prefix).rpartition(".lora_")
        layer = modules.get(path)
        layer = getattr(layer, "base_layer", layer)
        if part in ("A.weight", "B.weight"):
            value = _shaped_like(value, layer)
        if part == "A.weight" and not _has_kernel_of(value, layer):
            raise ValueError(
                f"{name} does not fit {target.pipeline}: the matrix of its layer "
                f"{path} has the shape {tuple(value.shape)}, and the pipeline's layer is a "
                f"{type(layer).__name__}"
            )
        shaped[key] = value
    return shaped


def _shaped_like(matrix: Tensor, layer: nn.Module | None) -> Tensor:
    """A LoRA's matrix with the axes of a linear layer or of a convolution."""
    if isinstance(layer, nn.Linear) and set(matrix.shape[2:]) == {1}:
        return matrix.flatten(1)
    if isinstance(layer, nn.Conv2d) and matrix.ndim == 2:
        return matrix[:, :, None, None]
    return matrix


def _has_kernel_of(matrix: Tensor, layer: nn.Module | None) -> bool:
    """Whether A reads what the layer reads: nothing more for a linear layer, else its kernel."""
    if isinstance(layer, nn.Linear):
        return matrix.ndim == 2
    if isinstance(layer, nn.Conv2d):
        return tuple(matrix.shape[2:]) == tuple(layer.kernel_size)
    return True


def _listed(names: list[str]) -> str:
    """The first of some names, and how many there are besides."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"
