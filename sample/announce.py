"""What a sample run says: what it is going to do, in betas and KL strengths, and at its end what that cost."""

from __future__ import annotations

import math

from deradiff.anchors.anchor import Anchor
from deradiff.models.base_model import BaseModel
from deradiff.realignment.dial import BEYOND_ANCHOR
from deradiff.realignment.registry import LABELS, MODES
from deradiff.realignment.resampling import GUIDED_PARTICLES
from deradiff.training.dpo import kl_strength
from deradiff.training.noising import noising_of
from sample.base_files import SCHEDULER, base_json
from sample.config import SampleConfig
from sample.manifest import Record


def announcement(config: SampleConfig, anchor: Anchor, prompts: int, device: str) -> str:
    beta = anchor.card.beta if anchor.card else None
    unit = kl_unit(config) if beta else None
    label = LABELS[config.mode_name]
    option = f" ({label.setting_text.format(config.mode_setting)})" if label.setting else ""
    trust = f", trust region {config.trust_region:g} nats" if config.trust_region else ""
    lines = [
        f"sample: {config.anchor} ({_strength(beta, unit)}) against {config.model.base}, mode {config.mode_name}{option}{trust}, "
        f"{config.sampler}, {config.steps} steps, guidance {config.guidance_scale:g}, {config.dtype} on {device}",
        f"sample: {prompts} prompts x {len(config.seeds)} seeds x {len(config.lambdas)} lambdas",
    ]
    if (
        config.particles > 1
        and config.guidance_scale is not None
        and config.guidance_scale > 1
        and not _distilled(config)
    ):
        lines.append(f"sample: {GUIDED_PARTICLES}; guidance_scale=1 has none")
    if config.lambdas[-1] > 1:  # they are sorted
        bound = (
            ""
            if config.trust_region or not MODES[config.mode].trust_region
            else "; trust_region=<nats> bounds the overshoot"
        )
        lines.append(f"sample: lambda {config.lambdas[-1]:g} {BEYOND_ANCHOR}{bound}")
    for lam in config.lambdas:
        target = (
            "the reference"
            if lam == 0
            else f"beta_target {_strength(beta / lam, unit)[5:]}"
            if beta
            else "beta_target unknown"
        )
        lines.append(f"  lam {lam:<6g} {target}" + ("  (the anchor)" if lam == 1 else ""))
    return "\n".join(lines)


def _strength(beta: float | None, unit: float | None) -> str:
    if beta is None:
        return "beta unknown"
    return f"beta {beta:g}" + (f", a KL strength of {beta * unit:.2g}" if unit else "")


def kl_unit(config: SampleConfig) -> float | None:
    """The KL strength that a code beta of 1 stands for at this run's size, from the base's config files; None where one is missing."""
    import diffusers

    family = BaseModel(str(config.model.base), config.model.revision).family
    try:
        scheduler, vae, denoiser = (
            base_json(config, name)
            for name in (SCHEDULER, "vae/config.json", f"{family.denoiser}/config.json")
        )
        published = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side = denoiser.get("sample_size", family.latent_side)
        sides = [
            math.ceil(pixels / factor) if pixels else side
            for pixels in (config.height, config.width)
        ]
        return kl_strength(1.0, vae["latent_channels"] * math.prod(sides), noising_of(published))
    except (KeyError, ValueError):
        return None


def _distilled(config: SampleConfig) -> bool:
    return BaseModel(str(config.model.base), config.model.revision).family.guidance_distilled


def cost(config: SampleConfig, records: list[Record]) -> str | None:
    """What mixing cost, of the manifest's images at these lambdas: evaluations a step and seconds an image, beside a plain model's."""
    measured = [r for r in records if r["lam"] in config.lambdas and r.get("seconds") is not None]
    mixed, plain = (
        [r for r in measured if (r["lam"] not in (0, 1)) is kind] for kind in (True, False)
    )
    if not mixed:
        return None
    said = f"mode {config.mode_name}: {_mean(mixed, 'evaluations'):.2f} evaluations a step and {_mean(mixed, 'seconds'):.3g} s an image"
    alone = (
        f"; lambda 0 and 1: {_mean(plain, 'evaluations'):.2f} and {_mean(plain, 'seconds'):.3g} s"
        if plain
        else ""
    )
    return f"sample: {said}{alone}"


def _mean(records: list[Record], key: str) -> float:
    return sum(record[key] for record in records) / len(records)
