"""What the tests of `realign` share: tiny pipelines, their anchors on disk, stock pipelines to be equal to, and what a network is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from tiny_pipelines import perturbed_unet, tiny_lora, tiny_pipeline

from deradiff.anchors import AnchorCard, save_anchor

STEPS = 3
BASES = {family: tiny_pipeline(family) for family in ("sd15", "sdxl")}
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "euler": EulerAncestralDiscreteScheduler}


@dataclass
class World:
    """A pipeline and, of the same base, the folders of two full and two LoRA anchors."""

    family: str
    pipe: Any
    anchors: dict[str, Path]

    def copy(self) -> World:
        return World(self.family, copy.deepcopy(self.pipe), self.anchors)

    def stock(self, anchor: str) -> Any:
        """The stock pipeline with the anchor's weights, the way that diffusers' users put them there."""
        pipe = copy.deepcopy(BASES[self.family])
        pipe.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        if anchor.startswith("lora"):
            pipe.load_lora_weights(self.anchors[anchor])
        else:
            pipe.unet = type(pipe.unet).from_pretrained(self.anchors[anchor], subfolder="unet")
        return pipe


def make_worlds(root: Path) -> dict[str, World]:
    """The two families, each with its anchors saved below `root`."""
    worlds = {}
    for family, base in BASES.items():
        networks = {f"full{i}": perturbed_unet(base.unet, seed=i) for i in (1, 2)} | {
            f"lora{i}": tiny_lora(base.unet, seed=i) for i in (1, 2)
        }
        for name, network in networks.items():
            save_anchor(root / family / name, network, AnchorCard(base_model="tiny", family=family, method=name[:4], beta=2000))
        worlds[family] = World(family, base, {name: root / family / name for name in networks})
    return worlds


def sample(pipe, seeds=(0, 1), **options):
    """Latents (N, 4, 8, 8), one generator an image."""
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent"} | options
    generators = [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(options.get("num_images_per_prompt", 1))]
    return pipe([f"prompt {seed}" for seed in seeds], generator=generators, **options).images


def fingerprint(network) -> dict[str, Any]:
    """All that a network is: modules, weights, gradients wanted, and attributes."""
    return {
        "modules": [(name, id(module), module.training) for name, module in network.named_modules()],
        "parameters": {
            name: (id(p), p.data_ptr(), p.requires_grad, p.detach().numpy().tobytes()) for name, p in network.named_parameters()
        },
        "attributes": sorted(vars(network)),
        "adapters": sorted(getattr(network, "peft_config", {})),
        "active": [(name, list(m.active_adapters), dict(m.scaling)) for name, m in network.named_modules() if hasattr(m, "scaling")],
    }


def denoise(unet, seed: int = 0):
    """One evaluation outside any loop, in the arguments of a pipeline, as a tuple."""
    x, text = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    with torch.no_grad():
        return unet(x.to(unet.dtype), torch.tensor(401), encoder_hidden_states=text.to(unet.dtype), return_dict=False)[0]
