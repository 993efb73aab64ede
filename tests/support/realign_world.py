"""What the tests of `realign` share: tiny pipelines with anchors on disk, stock pipelines to be
equal to, and what tells two networks apart.

Shapes: latents (N, 4, 8, 8), or FLUX's packed ones (N, 16, 64).
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import (
    EVERY_KIND,
    TINY,
    perturbed_denoiser,
    tiny_lora,
    tiny_pipeline,
    tiny_variant,
)

STEPS = 3
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerAncestralDiscreteScheduler,
}


class _Bases(dict[str, Any]):
    """A tiny pipeline of each family, made when it is first asked for; not to be changed."""

    def __missing__(self, family: str) -> Any:
        self[family] = tiny_pipeline(family)
        return self[family]


BASES = _Bases()


@dataclass
class World:
    """A pipeline, and the folders of two full and two LoRA anchors of the same base.

    Attributes:
        family: of the pipeline.
        pipe: the pipeline.
        anchors: folders by the anchor's name: full1, full2, lora1, lora2.
        kind: of the pipeline, a key of `tiny_pipelines.KINDS`.
    """

    family: str
    pipe: Any
    anchors: dict[str, Path]
    kind: str = "text2img"

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, FAMILIES[self.family].denoiser)

    def copy(self, kind: str = "text2img") -> World:
        """A world whose pipeline may be changed."""
        pipe = tiny_variant(copy.deepcopy(self.pipe), kind)
        return World(self.family, pipe, self.anchors, kind)

    def use_sampler(self, name: str, **settings: Any) -> None:
        """Give the pipeline a scheduler of SCHEDULERS."""
        config = self.pipe.scheduler.config
        self.pipe.scheduler = SCHEDULERS[name].from_config(config, **settings)

    def stock(self, anchor: str) -> Any:
        """The stock pipeline with the anchor's weights, as users of diffusers load them."""
        base = BASES[self.family]
        name = FAMILIES[self.family].denoiser
        network = getattr(base, name)
        is_lora = anchor.startswith("lora")
        if is_lora:
            network = copy.deepcopy(network)
        else:
            network = type(network).from_pretrained(self.anchors[anchor], subfolder=name)

        # All other parts are those of this world's pipeline, which is the test's own.
        parts = {part: self.pipe.components.get(part) for part in base.components}
        parts["scheduler"] = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        pipe = type(base)(**parts | TINY[self.family].options | {name: network})
        pipe.set_progress_bar_config(disable=True)
        if is_lora:
            pipe.load_lora_weights(self.anchors[anchor])
        return tiny_variant(pipe, self.kind, self.pipe.components.get("controlnet"))


def make_worlds(root: Path) -> dict[str, World]:
    """A world of each family of EVERY_KIND, with its anchors saved below `root`."""
    worlds = {}
    for family in EVERY_KIND:
        base = BASES[family]
        denoiser = getattr(base, FAMILIES[family].denoiser)
        networks = {}
        for i in (1, 2):
            networks[f"full{i}"] = perturbed_denoiser(denoiser, seed=i)
            networks[f"lora{i}"] = tiny_lora(denoiser, seed=i)
        anchors = {}
        for name, network in networks.items():
            anchors[name] = root / family / name
            card = AnchorCard(base_model="tiny", family=family, method=name[:4], beta=2000)
            save_anchor(anchors[name], network, card)
        worlds[family] = World(family, base, anchors)
    return worlds


def sample(pipe, seeds=(0, 1), **options):
    """Latents of one prompt a seed, with one generator an image."""
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    defaults |= _image_arguments(pipe, len(seeds))
    if family_of(pipe).flow:
        defaults["max_sequence_length"] = 16
    arguments = defaults | options

    generators = []
    for seed in seeds:
        for _ in range(arguments.get("num_images_per_prompt", 1)):
            generators.append(torch.Generator().manual_seed(seed))
    prompts = [f"prompt {seed}" for seed in seeds]

    # SD3's ControlNet pipelines encode their image with noise from the global generator.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pipe(prompts, generator=generators, **arguments).images


def _image_arguments(pipe, count: int) -> dict[str, Any]:
    """What a pipeline of this kind takes besides the prompt: images, masks, sizes."""
    blue = [Image.new("RGB", (64, 64), (30, 60, 200))] * count
    grey = [Image.new("RGB", (64, 64), (120, 120, 120))] * count
    mask = [Image.linear_gradient("L").resize((64, 64))] * count

    # `image` is the starting image, or in text-to-image of a UNet's ControlNet the control image.
    kind = type(pipe).__name__
    starts_from_image = "Img2Img" in kind or "Inpaint" in kind
    arguments = {
        "height": 64,
        "width": 64,
        "image": blue if starts_from_image else grey,
        "control_image": grey,
        "mask_image": mask,
        "control_mask": mask,
        "strength": 0.7,
    }
    accepted = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in arguments.items() if name in accepted}


def fingerprint(network) -> dict[str, Any]:
    """All that a network is: modules, weights, wanted gradients, attributes and adapters."""
    modules = []
    active = []
    for name, module in network.named_modules():
        modules.append((name, id(module), module.training))
        if hasattr(module, "scaling"):
            active.append((name, list(module.active_adapters), dict(module.scaling)))
    parameters = {}
    for name, p in network.named_parameters():
        content = p.detach().numpy().tobytes()
        parameters[name] = (id(p), p.data_ptr(), p.requires_grad, content)
    return {
        "modules": modules,
        "parameters": parameters,
        "attributes": sorted(vars(network)),
        "adapters": sorted(getattr(network, "peft_config", {})),
        "active": active,
    }


def denoise(unet, seed: int = 0):
    """One evaluation outside any chain, called as pipelines do it."""
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    text = torch.randn((2, 5, 32), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return unet(
            x.to(unet.dtype),
            torch.tensor(401),
            encoder_hidden_states=text.to(unet.dtype),
            return_dict=False,
        )[0]


def assert_between(middle, start, end, low, high):
    """Assert that `middle` is `low` to `high` distances of the two ends away from either."""
    distance = (end - start).norm()
    assert low * distance < (middle - start).norm() < high * distance
    assert low * distance < (middle - end).norm() < high * distance
