"""From what the user typed to what is sampled: every null decided, every mistake found.

Only configs and indexes are read, and no weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from configs.checks import section
from deradiff.anchors.anchor import BETA_CONVENTION, Anchor, check_anchor_family, load_anchor
from deradiff.anchors.beta_maps import PREFERENCE, PreferenceMap
from deradiff.anchors.mixtures import DECIMALS
from deradiff.anchors.weight_files import PICKLES_ARGUMENT
from deradiff.method.samplers import SAMPLERS, samplers_for
from deradiff.models.base_model import SCHEDULER_CONFIG, BaseModel
from deradiff.models.families import FAMILIES
from deradiff.realignment.registry import MODES
from sample.config import SAMPLING_DEFAULTS, SHAPES, ModelConfig, SampleConfig
from sample.dial_values import scheduled

SHAPES_ASSETS = "asset:shapes/"
"""How the sources of the shapes world's models begin."""


def resolve(config: SampleConfig) -> tuple[SampleConfig, BaseModel, list[Anchor]]:
    """Decide every null of a config, and find its base model and anchors.

    Raises:
        ValueError: in one sentence, for what cannot work.
    """
    anchors = [find_anchor(anchor, config.read_pickled_tensors) for anchor in config.anchors]
    # What `model=` says is known before the hub is asked for anything
    base = base_for(config.model, anchors)
    resolved = _with_defaults(config, base, anchors)
    _check_fits(resolved, base, anchors)
    return resolved, base, anchors


def base_for(model: ModelConfig, anchors: Sequence[Anchor]) -> BaseModel:
    """The base model of anchors, which is there and is of their family.

    Raises:
        ValueError: in one sentence, for what does not fit.
    """
    if model.name in FAMILIES:
        for anchor in anchors:
            check_anchor_family(anchor, str(model.name))
    base = find_base(model, anchors)
    with section("model"):
        family = base.family.name
    for anchor in anchors:
        check_anchor_family(anchor, family)
    with section("model"):
        base.check()
    return base


def find_anchor(source: str, pickles_allowed: bool) -> Anchor:
    """`load_anchor`, whose refusal of a pickle names the stage's key."""
    try:
        return load_anchor(source, read_pickled_tensors=pickles_allowed)
    except ValueError as error:
        message = str(error).replace(PICKLES_ARGUMENT, "read_pickled_tensors=true")
        raise ValueError(message) from error


def find_base(model: ModelConfig, anchors: Sequence[Anchor]) -> BaseModel:
    """The base model that a config names, or else the one that the anchors' cards name.

    Raises:
        ValueError: where neither does, or where the cards disagree.
    """
    base = BaseModel(model.base, model.revision, model.vae) if model.base else None
    if base is None:
        base = _base_of_cards(anchors, model.vae)
    return base


def _base_of_cards(anchors: Sequence[Anchor], vae: str | None) -> BaseModel:
    """The one base model that the cards of anchors name, perhaps with another autoencoder."""
    bases = []
    for anchor in anchors:
        card = anchor.card
        if card is None:
            raise ValueError(
                f"{anchor.source} has no card to name its base: give model=sd15, model=sdxl or "
                "model.base=<pipeline folder or hub id>"
            )
        bases.append((card.base_model, card.base_revision, vae or card.vae))
    if len(set(bases)) > 1:
        names = " and ".join(str(name) for name, _, _ in bases)
        raise ValueError(
            f"the anchors were aligned from different bases, {names}: give "
            "model.base=<the one to mix them on>"
        )
    return BaseModel(*bases[0])


def _with_defaults(
    config: SampleConfig, base: BaseModel, anchors: Sequence[Anchor]
) -> SampleConfig:
    """The config with every null decided."""
    is_shapes = base.source.startswith(SHAPES_ASSETS)
    family = base.family
    defaults = SAMPLING_DEFAULTS[SHAPES if is_shapes else family.name]
    model = replace(config.model, base=base.source, revision=base.revision, vae=base.vae)

    # Prompts: the shapes world has its own
    prompts = config.prompts
    if prompts is None:
        prompts = SHAPES if is_shapes else []

    # Lambdas: in order, with those of the targets
    lambdas = config.lambdas
    if len(anchors) == 1:
        lambdas = sorted({*config.lambdas, *lams_of_targets(config, anchors[0])})
    else:
        lambdas = sorted(config.lambdas, key=_by_share)

    # Precision: half on a GPU
    half = "bfloat16" if family.flow else "float16"
    dtype = half if torch.cuda.is_available() else "float32"

    # Numbers; a particle takes the place of an image in a batch
    batch_size = max(1, defaults.batch_size // config.particles)
    guidance = config.guidance_scale
    path_kl = config.path_kl
    return replace(
        config,
        model=model,
        lambdas=lambdas,
        prompts=prompts,
        sampler=config.sampler or defaults.sampler,
        steps=config.steps or defaults.steps,
        batch_size=config.batch_size or batch_size,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
        height=config.height or model.resolution,
        width=config.width or model.resolution,
        dtype=config.dtype or dtype,
        path_kl=MODES[config.mode].measures_path_kl if path_kl is None else path_kl,
    )


def _by_share(lams: Sequence[float]) -> tuple[float, list[float]]:
    """The order of mixtures: by the sum of their lambdas, then the first anchors' largest first."""
    return round(sum(lams), DECIMALS), [-lam for lam in lams]


def lams_of_targets(config: SampleConfig, anchor: Anchor) -> list[float]:
    """The lambda of each target: beta / target, or by the preferences on the anchor's card.

    Raises:
        ValueError: where the anchor's beta is not known, or not in the convention of the targets;
            and where its card does not know the targets' lambdas.
    """
    if config.targets_by == PREFERENCE:
        by_preference = PreferenceMap(anchor)
        return [by_preference.lam_of(target) for target in config.targets]
    if not config.targets:
        return []
    card = anchor.card
    if card is None or card.beta is None:
        raise ValueError(
            f"the beta of {config.anchor} is not known, so targets cannot be turned into lambdas: "
            "give lambdas=[...] instead"
        )
    if card.beta_convention != BETA_CONVENTION:
        raise ValueError(
            f"targets are betas in the convention {BETA_CONVENTION}, and the beta of "
            f"{config.anchor} is in the convention {card.beta_convention}: give lambdas=[...] "
            "instead, each the anchor's beta / the target's in one convention"
        )
    return [card.beta / target for target in config.targets]


def _check_fits(config: SampleConfig, base: BaseModel, anchors: Sequence[Anchor]) -> None:
    """Raises ValueError for options that this family, base or anchor does not have."""
    scheduled(1.0, config.lam_schedule)
    _check_branch(config, base)
    family = base.family
    sampler = SAMPLERS[str(config.sampler)]
    if sampler.flow != family.flow:
        fitting = ", ".join(samplers_for(family.flow))
        raise ValueError(
            f"sampler={config.sampler} is not for {family.name}: give one of {fitting}"
        )
    if sampler.exact_spacing:
        check_spacing(config, base)
    for key in ("height", "width"):
        side = getattr(config, key)
        if side and side % family.multiple:
            raise ValueError(
                f"{key} must be a multiple of {family.multiple} pixels for {family.name}, "
                f"not {side}"
            )
    for anchor in anchors:
        if config.batched and anchor.method == "full":
            raise ValueError(
                "batched=true evaluates a LoRA and its reference as one batch, and "
                f"{anchor.source} is a full anchor: remove it"
            )


def _check_branch(config: SampleConfig, base: BaseModel) -> None:
    """Raises ValueError for a lambda on a branch of guidance that the pipeline does not have."""
    assert config.guidance_scale is not None  # decided before
    is_guided = config.guidance_scale > base.family.no_guidance
    has_branches = is_guided and not base.family.guidance_distilled
    if config.branch == "unconditional" and not has_branches:
        raise ValueError(
            f"branch=unconditional needs guidance, and guidance_scale={config.guidance_scale:g} of "
            f"{base.family.name} evaluates the prompt alone: give a larger guidance_scale, or "
            "branch=both"
        )


def check_spacing(config: SampleConfig, base: BaseModel) -> None:
    """Raises ValueError where diffusers' DDIM would not step to its own next timestep.

    It steps to t - T // steps, with T timesteps in training, wherever the next timestep of its
    spacing lies. What the chain draws then has another variance than its noise level: 6 to 49 % off
    for `trailing` at 300 and 400 steps.
    """
    steps = config.steps
    assert steps  # decided before
    published = base.read_json(SCHEDULER_CONFIG)
    spacing = published.get("timestep_spacing", "leading")
    trained = published.get("num_train_timesteps", 1000)
    misses_trailing = spacing == "trailing" and trained % steps
    misses_linspace = spacing == "linspace" and trained != steps
    if not (misses_trailing or misses_linspace):
        return
    fewer = ""
    if spacing == "trailing":
        divisor = next(n for n in range(steps, 0, -1) if trained % n == 0)
        fewer = f"steps={divisor}, which divides {trained}, or "
    raise ValueError(
        f"sampler={config.sampler} with {steps} steps and the timestep_spacing={spacing} of "
        f"{base.source} misses its own next timestep: give {fewer}sampler=euler"
    )
