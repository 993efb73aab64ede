"""What the tests of `realign` share: tiny pipelines, their anchors on disk, stock pipelines to be equal to, and what a network is."""

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
from tests.support.tiny_pipelines import perturbed_denoiser, tiny_lora, tiny_pipeline, tiny_variant

STEPS = 3
BASES = {family: tiny_pipeline(family) for family in FAMILIES}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerAncestralDiscreteScheduler,
}


@dataclass
class World:
    """A pipeline and, of the same base, the folders of two full and two LoRA anchors; kind: a key of `tiny_pipelines.KINDS`."""

    family: str
    pipe: Any
    anchors: dict[str, Path]
    kind: str = "text2img"

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, FAMILIES[self.family].denoiser)

    def copy(self, kind: str = "text2img") -> World:
        return World(self.family, tiny_variant(copy.deepcopy(self.pipe), kind), self.anchors, kind)

    def stock(self, anchor: str) -> Any:
        """The stock pipeline with the anchor's weights, the way that diffusers' users put them there."""
        pipe = copy.deepcopy(BASES[self.family])
        pipe.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        if anchor.startswith("lora"):
            pipe.load_lora_weights(self.anchors[anchor])
        else:
            name = FAMILIES[self.family].denoiser
            network = type(getattr(pipe, name)).from_pretrained(
                self.anchors[anchor], subfolder=name
            )
            pipe.register_modules(**{name: network})
        return tiny_variant(pipe, self.kind, self.pipe.components.get("controlnet"))


def make_worlds(root: Path) -> dict[str, World]:
    """Every family, each with its anchors saved below `root`."""
    worlds = {}
    for family, base in BASES.items():
        denoiser = getattr(base, FAMILIES[family].denoiser)
        networks = {f"full{i}": perturbed_denoiser(denoiser, seed=i) for i in (1, 2)}
        networks |= {f"lora{i}": tiny_lora(denoiser, seed=i) for i in (1, 2)}
        for name, network in networks.items():
            save_anchor(
                root / family / name,
                network,
                AnchorCard(base_model="tiny", family=family, method=name[:4], beta=2000),
            )
        worlds[family] = World(family, base, {name: root / family / name for name in networks})
    return worlds


def sample(pipe, seeds=(0, 1), **options):
    """Latents (N, 4, 8, 8), or FLUX's packed ones (N, 16, 64), one generator an image."""
    options = (
        {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"}
        | _pictures(pipe, len(seeds))
        | options
    )
    if FAMILIES[family_of(pipe).name].flow:
        options = {"max_sequence_length": 16} | options
    generators = [
        torch.Generator().manual_seed(seed)
        for seed in seeds
        for _ in range(options.get("num_images_per_prompt", 1))
    ]
    with torch.random.fork_rng():
        torch.manual_seed(
            0
        )  # SD3's ControlNet pipelines encode their picture with noise that no generator is asked for
        return pipe([f"prompt {seed}" for seed in seeds], generator=generators, **options).images


def _pictures(pipe, count: int) -> dict[str, Any]:
    """The arguments that a pipeline of this kind takes beside the prompt: pictures, masks, sizes."""
    accepted = inspect.signature(pipe.__call__).parameters
    blue, grey = (
        [Image.new("RGB", (64, 64), colour)] * count for colour in ((30, 60, 200), (120, 120, 120))
    )
    mask = [Image.linear_gradient("L").resize((64, 64))] * count
    kind = type(pipe).__name__
    given = {
        "height": 64,
        "width": 64,
        "image": blue,
        "control_image": grey,
        "mask_image": mask,
        "control_mask": mask,
        "strength": 0.7,
    }
    if not ("Img2Img" in kind or "Inpaint" in kind):
        given["image"] = (
            grey  # a ControlNet's, in the UNets' pipelines; other text-to-image pipelines have none
        )
    return {name: value for name, value in given.items() if name in accepted}


def fingerprint(network) -> dict[str, Any]:
    """All that a network is: modules, weights, gradients wanted, and attributes."""
    return {
        "modules": [
            (name, id(module), module.training) for name, module in network.named_modules()
        ],
        "parameters": {
            name: (id(p), p.data_ptr(), p.requires_grad, p.detach().numpy().tobytes())
            for name, p in network.named_parameters()
        },
        "attributes": sorted(vars(network)),
        "adapters": sorted(getattr(network, "peft_config", {})),
        "active": [
            (name, list(m.active_adapters), dict(m.scaling))
            for name, m in network.named_modules()
            if hasattr(m, "scaling")
        ],
    }


def denoise(unet, seed: int = 0):
    """One evaluation outside any loop, in the arguments of a pipeline, as a tuple."""
    x, text = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for shape in ((2, 4, 8, 8), (2, 5, 32))
    )
    with torch.no_grad():
        return unet(
            x.to(unet.dtype),
            torch.tensor(401),
            encoder_hidden_states=text.to(unet.dtype),
            return_dict=False,
        )[0]
