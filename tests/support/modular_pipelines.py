"""Tiny modular pipelines of diffusers, and the same chains mixed by hand."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.models.pipelines import denoiser_name
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_lora, tiny_pipeline

SCALE = 5.0
STEPS = 3
UNET_LAYERS = "mid_block.attentions.0.transformer_blocks"


def _layers(**settings: Any) -> LayerSkipConfig:
    """The layers of SDXL's UNet that a guider changes."""
    return LayerSkipConfig(indices=[0], fqn=UNET_LAYERS, **settings)


GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=SCALE),
    "rescaled": lambda: ClassifierFreeGuidance(guidance_scale=SCALE, guidance_rescale=0.7),
    "in a part of the steps": lambda: ClassifierFreeGuidance(guidance_scale=SCALE, start=0.4),
    "projected": lambda: AdaptiveProjectedGuidance(guidance_scale=SCALE, eta=0.0),
    "zero star": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=1),
    "tangential": lambda: TangentialClassifierFreeGuidance(guidance_scale=SCALE),
    "perturbed attention": lambda: PerturbedAttentionGuidance(
        SCALE, 2.0, 0.0, 1.0, perturbed_guidance_config=_layers(skip_attention_scores=True)
    ),
    "skip layer": lambda: SkipLayerGuidance(SCALE, 2.0, 0.0, 1.0, skip_layer_config=_layers()),
    "auto": lambda: AutoGuidance(SCALE, auto_guidance_config=_layers()),
    "auto with dropout": lambda: AutoGuidance(SCALE, auto_guidance_config=_layers(dropout=0.3)),
}
"""diffusers' guiders, as they are for SDXL's UNet."""

BLOCKS = {
    "sdxl": "StableDiffusionXLAutoBlocks",
    "sd3": "StableDiffusion3AutoBlocks",
    "flux": "FluxAutoBlocks",
    "flux2": "Flux2AutoBlocks",
    "flux2_klein": "Flux2KleinAutoBlocks",
    "flux2_klein base": "Flux2KleinBaseAutoBlocks",
    "qwen_image": "QwenImageAutoBlocks",
    "z_image": "ZImageAutoBlocks",
}
"""diffusers' blocks of modular pipelines, by family and variant."""


def modular(pipe: Any, guider: Any = None, name: str = "sdxl") -> Any:
    """A modular pipeline of the same components.

    Args:
        pipe: a pipeline.
        guider: its guider; None: the default one of its blocks, or none where they have none.
        name: a key of BLOCKS.
    """
    blocks = getattr(diffusers, BLOCKS[name])().init_pipeline()
    components = {}
    for part, component in pipe.components.items():
        if component is not None and part in blocks._component_specs:
            components[part] = component
    if guider is not None:
        components["guider"] = guider
    blocks.update_components(**components)
    blocks.set_progress_bar_config(disable=True)
    return blocks


def tiny_modular(name: str) -> Any:
    """A modular pipeline of a family, in float32 on the CPU.

    Args:
        name: a key of BLOCKS.
    """
    return modular(tiny_pipeline(name.removesuffix(" base")), name=name)


def sample(pipe: Any, steps: int = STEPS, **options: Any) -> torch.Tensor:
    """Latents of one prompt."""
    arguments = {"negative_prompt": "", "max_sequence_length": 16}
    if "Flux2Modular" in type(pipe).__name__:
        arguments["text_encoder_out_layers"] = (1, 2, 3)
    expected = {parameter.name for parameter in pipe.blocks.inputs}
    arguments = {key: value for key, value in arguments.items() if key in expected}

    # Some guiders draw from the global generator.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pipe(
            prompt="a cat",
            num_inference_steps=steps,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            output="latents",
            **arguments,
            **options,
        )


def save_anchors(pipe: Any, folder: Path, family: str) -> dict[str, Path]:
    """A full and a LoRA anchor of a pipeline on disk.

    Args:
        pipe: the pipeline.
        folder: where to save them.
        family: of the pipeline.
    """
    denoiser = getattr(pipe, denoiser_name(pipe))
    networks = {"full": perturbed_denoiser(denoiser), "lora": tiny_lora(denoiser)}
    anchors = {}
    for method, network in networks.items():
        anchors[method] = folder / method
        card = AnchorCard(base_model="tiny", family=family, method=method, beta=2000)
        save_anchor(anchors[method], network, card)
    return anchors


class ByHand:
    """What a pipeline's network predicts, mixed by hand while `installed` lasts.

    The network is evaluated with its own weights and with the anchor's, one after the other, so
    that what a guider has put on it acts on both.

    Args:
        pipe: the modular pipeline.
        weights: of the anchor's network.
        lams: lambda of the first evaluation of a step, and of the others.

    Attributes:
        shifts: at each step, the guided output minus the reference's.
    """

    def __init__(
        self, pipe: Any, weights: dict[str, torch.Tensor], lams: tuple[float, float]
    ) -> None:
        self.pipe = pipe
        self.network = getattr(pipe, denoiser_name(pipe))
        self.weights = weights
        self.lams = lams
        self.shifts: list[torch.Tensor] = []
        # The reference's output by the identity of the mixture, which is kept beside it.
        self._references: dict[int, tuple[Any, Any]] = {}

    @contextmanager
    def installed(self) -> Iterator[ByHand]:
        """Have the pipeline's network and its guider go through here."""
        guider = getattr(self.pipe, "guider", None)
        forward = self.network.forward
        own_weights = {name: value.clone() for name, value in self.network.state_dict().items()}

        @functools.wraps(forward)
        def mixed(*args: Any, **kwargs: Any) -> Any:
            start = torch.get_rng_state()
            reference = forward(*args, **kwargs)
            torch.set_rng_state(start)
            self.network.load_state_dict(self.weights)
            anchor = forward(*args, **kwargs)
            self.network.load_state_dict(own_weights)
            return self._mixture(reference, anchor)

        self.network.forward = mixed
        if guider is not None:
            guider.forward = self._watched(guider.forward)
        try:
            yield self
        finally:
            del self.network.forward
            if guider is not None:
                del guider.forward

    def _mixture(self, reference: Any, anchor: Any) -> Any:
        """The mixture of two outputs: a tensor, or a structure around one."""
        guider = getattr(self.pipe, "guider", None)
        is_first = guider is None or guider.get_state()["count_prepared"] == 1
        lam = self.lams[0] if is_first else self.lams[1]
        if isinstance(reference, torch.Tensor):
            mixture = (reference.double() + lam * (anchor.double() - reference.double())).float()
            self._references[id(mixture)] = (mixture, reference)
            return mixture
        parts = [self._mixture(own, theirs) for own, theirs in zip(reference, anchor)]
        return type(reference)(parts)

    def _watched(self, forward: Any) -> Any:
        """A guider's forward that guides the reference's outputs, too."""

        def guide(**predictions: Any) -> Any:
            references = {}
            for name, prediction in predictions.items():
                references[name] = self._references.get(id(prediction), (None, None))[1]
            guided = forward(**predictions)
            if all(reference is not None for reference in references.values()):
                self.shifts.append(guided.pred - forward(**references).pred)
            return guided

        return guide
