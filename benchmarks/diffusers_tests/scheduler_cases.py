"""Cases for schedulers: every one that the pipelines of SD1.5 and SDXL take, in these pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers

OTHERS = (
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "EDMDPMSolverMultistepScheduler",
    "IPNDMScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
)
"""Schedulers that are set in these pipelines, too, beside those that diffusers names for them."""

WITHOUT_CONFIG = "EDM"
"""How the names begin of schedulers that have no use for another one's config."""

PUBLISHED = {"skip_prk_steps": True}
"""What SD1.5's published config says and that of diffusers' tests does not."""

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "DDIMScheduler": (
        {"clip_sample": True},
        {"thresholding": True},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
    ),
    "DDPMScheduler": (
        {"clip_sample": True},
        {"variance_type": "fixed_large"},
        {"thresholding": True},
    ),
    "EulerDiscreteScheduler": (
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
        {"prediction_type": "v_prediction"},
        {"timestep_type": "continuous"},
    ),
    "EulerAncestralDiscreteScheduler": ({"prediction_type": "v_prediction"},),
    "DPMSolverMultistepScheduler": (
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
        {"use_karras_sigmas": True},
        {"use_lu_lambdas": True},
        {"thresholding": True},
        {"euler_at_final": True},
    ),
    "DPMSolverSinglestepScheduler": ({"solver_order": 3}, {"thresholding": True}),
    "UniPCMultistepScheduler": ({"solver_order": 3}, {"thresholding": True}),
    "DEISMultistepScheduler": ({"thresholding": True},),
    "HeunDiscreteScheduler": ({"clip_sample": True}, {"use_karras_sigmas": True}),
    "LMSDiscreteScheduler": ({"use_karras_sigmas": True},),
    "LCMScheduler": ({"clip_sample": True},),
}
"""Settings that change what a step does."""


def schedulers_in(test_class: Any, *, with_variants: bool) -> Iterator[tuple[str, Any]]:
    """A name and a test class for each scheduler in the pipeline of a test class.

    Args:
        test_class: the class of diffusers' tests.
        with_variants: whether the settings of VARIANTS have classes, too.
    """
    base = test_class().get_dummy_components()["scheduler"]
    names = [kind.__name__ for kind in base.compatibles]
    for name in sorted({*names, *OTHERS}):
        yield name, _with_scheduler(test_class, name, {})
        for settings in VARIANTS.get(name, ()) if with_variants else ():
            words = ", ".join(f"{key}={value}" for key, value in settings.items())
            yield f"{name}({words})", _with_scheduler(test_class, name, settings)


def _with_scheduler(test_class: Any, name: str, settings: dict[str, Any]) -> Any:
    """The test class with another scheduler."""

    class WithScheduler(test_class):
        def get_dummy_components(self) -> dict[str, Any]:
            """The pipeline's components."""
            components = super().get_dummy_components()
            kind: Any = getattr(diffusers, name)
            config = {} if name.startswith(WITHOUT_CONFIG) else dict(components["scheduler"].config)
            own = {key: value for key, value in config.items() if not key.startswith("_")}
            components["scheduler"] = kind.from_config(own | PUBLISHED | settings)
            return components

    return WithScheduler
