"""What a sample run says: at its start what it is going to do, at its end what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.beta_maps import PREFERENCE
from deradiff.anchors.mixtures import MixedAnchor, anchor_name, as_one_anchor
from deradiff.evaluation.statistics import Estimate
from deradiff.evaluation.tables.table import interval
from deradiff.models.base_model import SCHEDULER_CONFIG, BaseModel
from deradiff.realignment.dial import BEYOND_ANCHOR, NEGATIVE
from deradiff.realignment.registry import LABELS, MODES, is_one_network
from deradiff.realignment.resampling import GUIDED_PARTICLES
from deradiff.training.dpo import kl_strength
from deradiff.training.noising import noising_of
from sample.config import SampleConfig
from sample.manifest import Lams, Record, lam_folder
from sample.sampling import beta_target

NO_BETA = "beta unknown"


def announcement(
    config: SampleConfig, base: BaseModel, anchors: Sequence[Anchor], prompts: int, device: str
) -> list[str]:
    """Lines that say what is sampled, in betas and KL strengths, and what to be careful with.

    Args:
        config: a resolved config.
        base: its base model.
        anchors: its anchors.
        prompts: how many there are.
        device: in words.
    """
    unit = kl_unit(config, base) if any(map(_beta, anchors)) else None
    named = []
    for anchor in anchors:
        beta = _beta(anchor)
        named.append(f"{anchor.source} ({f'beta {_strength(beta, unit)}' if beta else NO_BETA})")
    trust = f", trust region {config.trust_region:g} nats" if config.trust_region else ""
    how = ""
    if config.branch != "both":
        how += f", lambda on the {config.branch} branch"
    if config.lam_schedule:
        how += f", lambda times {config.lam_schedule} in time"
    lines = [
        f"sample: {' and '.join(named)} against {base.source}, "
        f"mode {_mode(config)}{trust}{how}, {config.sampler}, {config.steps} steps, "
        f"guidance {config.guidance_scale:g}, {config.dtype} on {device}",
        f"sample: {prompts} prompts x {len(config.seeds)} seeds x {len(config.lambdas)} lambdas",
    ]
    lines += [line for anchor in anchors if (line := calibrated(anchor))]
    lines += _cautions(config, base)
    numbers = [lams_text(lams) for lams in config.points]
    width = max(6, *map(len, numbers))
    for lams, lam in zip(config.points, numbers):
        model = as_one_anchor(config.anchors, lams)
        is_own = model.is_anchor and len(anchors) == 1 and not how
        role = "  (the anchor)" if is_own else ""
        lines.append(f"  lam {lam:<{width}} {_target(model, config, anchors, unit)}{role}")
    return lines


def lams_text(lams: Lams) -> str:
    """Lambda of each anchor, for people."""
    return ", ".join(f"{lam:g}" for lam in lams)


def _beta(anchor: Anchor) -> float | None:
    return anchor.card.beta if anchor.card else None


def calibrated(anchor: Anchor) -> str:
    """What held-out pairs said of an anchor; empty where its card does not know it.

    Args:
        anchor: one of those that are sampled.
    """
    numbers = anchor.card.calibration if anchor.card else None
    if not numbers or "beta_eff" not in numbers:
        return ""
    acts = interval(_estimate(numbers, "beta_eff"))
    pairs = numbers.get("pairs", 0)
    line = f"sample: on {pairs:g} held-out pairs {anchor.source} acts like beta {acts}"
    if "best_lam" in numbers:
        best = interval(_estimate(numbers, "best_lam"))
        line += f", and lam {best} has the lowest loss at its own beta"
    return line


def _estimate(numbers: Mapping[str, float], name: str) -> Estimate:
    """An estimate from a card."""
    return Estimate(*(numbers.get(name + end, math.nan) for end in ("", "_low", "_high")))


def _mode(config: SampleConfig) -> str:
    """The mode with its number."""
    if config.mode_detail is None:
        return config.mode_name
    setting = LABELS[config.mode_name].setting_text.format(config.mode_detail)
    return f"{config.mode_name} ({setting})"


def _cautions(config: SampleConfig, base: BaseModel) -> list[str]:
    """What `realign` would warn of, said once before the progress bar."""
    lines = []
    scale = config.guidance_scale
    is_guided = scale is not None and scale > base.family.no_guidance
    two_rows = is_guided and not base.family.guidance_distilled
    if config.particles > 1 and two_rows:
        unguided = f"guidance_scale={base.family.no_guidance:g} has none"
        lines.append(f"sample: {GUIDED_PARTICLES}; {unguided}")
    factors = str(config.lam_schedule)
    if min(map(min, config.points)) < 0 or "-" in factors:
        lines.append(f"sample: {NEGATIVE}")
    largest = max(map(sum, config.points))
    if largest > 1:
        can_bound = MODES[config.mode].trust_region and not config.trust_region
        bound = "; trust_region=<nats> bounds the overshoot" if can_bound else ""
        lines.append(f"sample: lambda {largest:g} {BEYOND_ANCHOR}{bound}")
    return lines


def _target(
    model: MixedAnchor, config: SampleConfig, anchors: Sequence[Anchor], unit: float | None
) -> str:
    """What a lambda imitates."""
    if model.lam == 0:
        return "the reference"
    target = beta_target(model, config, anchors)
    text = f"beta_target {_strength(target, unit)}" if target else "beta_target unknown"
    if target and config.targets_by == PREFERENCE:
        text += ", by preference"
    if len(anchors) > 1:
        text = f"{anchor_name(model.anchor)}, {text}"
    return text


def _strength(beta: float, unit: float | None) -> str:
    """A beta, and the KL strength that it stands for where that is known."""
    if not unit:
        return f"{beta:g}"
    return f"{beta:g}, a KL strength of {beta * unit:.2g}"


def kl_unit(config: SampleConfig, base: BaseModel) -> float | None:
    """The KL strength that a beta of 1 stands for at this run's size.

    It is computed from the base model's config files; None where one of them is missing.
    """
    family = base.family
    try:
        scheduler = base.read_json(SCHEDULER_CONFIG)
        vae = base.read_json("vae/config.json")
        denoiser = base.read_json(f"{family.denoiser}/config.json")
        published = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
        shrinking = family.pixels_per_latent(vae)
        side = denoiser.get("sample_size", family.latent_side)
        sides = []
        for pixels in (config.height, config.width):
            sides.append(math.ceil(pixels / shrinking) if pixels else side)
        numbers = family.latent_channels(vae) * math.prod(sides)
        return kl_strength(1.0, numbers, noising_of(published))
    except (KeyError, ValueError):
        return None


def cost(config: SampleConfig, records: Sequence[Record]) -> str | None:
    """What mixing cost beside a plain model, in words; None where nothing was mixed.

    Args:
        config: its lambdas are looked at.
        records: of the manifest.
    """
    folders = {lam_folder(lams) for lams in config.points}
    measured = []
    for record in records:
        if Path(record["image"]).parent.name in folders and record["seconds"] is not None:
            measured.append(record)
    mixed = [record for record in measured if not is_one_network(record)]
    plain = [record for record in measured if is_one_network(record)]
    if not mixed:
        return None
    alone = ""
    if plain:
        alone = (
            f"; lambda 0 and 1: {_mean(plain, 'evaluations'):.2f} and "
            f"{_mean(plain, 'seconds'):.3g} s"
        )
    return (
        f"sample: mode {config.mode_name}: {_mean(mixed, 'evaluations'):.2f} evaluations a step "
        f"and {_mean(mixed, 'seconds'):.3g} s an image{alone}"
    )


def _mean(records: Sequence[Record], key: str) -> float:
    return sum(record[key] for record in records) / len(records)
