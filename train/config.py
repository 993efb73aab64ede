"""The train stage's config: what is trained, from what, on what, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.checks import choice, not_negative, positive
from configs.tracking import TrackingConfig
from train.data_config import SOURCES, DataConfig

OPTIMIZERS = (
    "adamw",
    "adafactor",
    "adamw8bit_torchao",
    "adamw8bit_bitsandbytes",
)  # deradiff.training.optimizers'
OBJECTIVES = {  # objective: does it learn from pairs?
    "dpo": True,
    "pretrain": False,
    "contrastive": False,
    "preference": True,
    "autoencoder": False,
}


@dataclass
class ModelConfig:
    """name: what the run directory is called by. base: a pipeline folder, hub id or `asset:...`. vae: an autoencoder in place of its own.

    base null starts a new small model from its parts: vae, a CLIP folder, the channels of the UNet's levels. resolution: pixels of a side.
    gradient_checkpointing: less memory, a forward more. compile: torch.compile of the blocks that repeat.
    """

    name: str = "shapes"
    base: str | None = None
    revision: str | None = None
    vae: str | None = None
    resolution: int = 512
    clip: str | None = None
    channels: list[int] = field(default_factory=lambda: [48, 96])
    clip_width: int = 64
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.resolution <= 0 or self.resolution % 8:
            raise ValueError(f"model.resolution must be a multiple of 8, not {self.resolution}")
        if not self.channels or any(c <= 0 or c % 8 for c in self.channels):
            raise ValueError(
                f"model.channels must be multiples of 8, a level each, not {self.channels}"
            )


@dataclass
class FinetuneConfig:
    """method: `lora` or `full`. rank, alpha: the LoRA's; its update is scaled by alpha / rank. targets: the ends of the names of
    the layers that a LoRA adapts; none: the family's attention layers.
    """

    method: str = "lora"
    rank: int = 16
    alpha: int = 16
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        choice("finetune.method", self.method, ("lora", "full"))
        positive("finetune.rank", self.rank)
        positive("finetune.alpha", self.alpha)


@dataclass
class DPOConfig:
    """beta: the KL strength in the convention `mean-half` (deradiff.training.dpo): diffusers' SD1.5 example calls half of it beta.

    reference_errors: keep what the reference makes of each pair below runs/cache, and read what a run of another beta kept there.
    """

    beta: float = 2000.0
    reference_errors: bool = True

    def __post_init__(self) -> None:
        positive("dpo.beta", self.beta)


@dataclass
class OptimConfig:
    """name: `adamw`, `adafactor`, `adamw8bit_torchao` or `adamw8bit_bitsandbytes`. lr: per pair of a step where `per_pair` is set, as the
    published launchers scale it; the rate of a step otherwise. batch_size: pairs of one forward on one GPU. accumulation: forwards a
    step. ema: decay of a moving average that is saved in place of the weights; 0: none. decay: `constant` or `cosine`, after `warmup`.
    rule: `inverse_beta` multiplies it by 2000 / beta (the paper), `fixed` does not (its code). The actual rate is printed.
    """

    name: str = "adamw"
    lr: float = 1e-8
    per_pair: bool = True
    rule: str = "inverse_beta"
    warmup: int = 0
    decay: str = "constant"
    weight_decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.0
    batch_size: int = 1
    accumulation: int = 128

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZERS)
        choice("optim.rule", self.rule, ("inverse_beta", "fixed"))
        choice("optim.decay", self.decay, ("constant", "cosine"))
        for key in ("lr", "batch_size", "accumulation"):
            positive(f"optim.{key}", getattr(self, key))
        for key in ("warmup", "weight_decay", "clip"):
            not_negative(f"optim.{key}", getattr(self, key))
        if not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema must lie in [0, 1), not {self.ema}")


@dataclass
class PanelConfig:
    """every: steps between pictures of what is being trained, and one at the end; 0: none. prompts: of the pictures; none: of the data.

    lambdas: across. steps: of the sampler. guidance_scale: null: the pipeline's own.
    """

    every: int = 500
    prompts: list[str] = field(default_factory=list)
    lambdas: list[float] = field(default_factory=lambda: [0.0, 1.0, 2.0])
    steps: int = 25
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        not_negative("panel.every", self.every)
        positive("panel.steps", self.steps)
        if not self.lambdas:
            raise ValueError(
                "panel.lambdas is empty: give at least one, as in panel.lambdas=[0,1,2]"
            )


@dataclass
class HubConfig:
    """push_to: the hub repository (`user/name`) that a finished anchor is uploaded to; null: none."""

    push_to: str | None = None


@dataclass
class TrainConfig:
    """One run. name: its folder below runs/train; null composes it from model, objective, method, beta and seed. runs: of all runs.

    objective: `dpo`, `pretrain`, `contrastive`, `preference` or `autoencoder`. steps: optimiser steps. precision: `no`, `fp16` or `bf16`.
    cpu: leaves GPUs alone. keep_last, keep_best: checkpoints that stay, the newest and those of the lowest loss.
    """

    objective: str = "dpo"
    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="shapes_pairs"))
    dpo: DPOConfig = field(default_factory=DPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    panel: PanelConfig = field(default_factory=PanelConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    steps: int = 2000
    seed: int = 0
    precision: str = "no"
    cpu: bool = False
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_best: int = 0
    name: str | None = None
    runs: str = "runs"

    def __post_init__(self) -> None:
        choice("objective", self.objective, OBJECTIVES)
        choice("precision", self.precision, ("no", "fp16", "bf16"))
        for key in ("steps", "log_every", "checkpoint_every", "keep_last"):
            positive(key, getattr(self, key))
        not_negative("seed", self.seed)
        not_negative("keep_best", self.keep_best)
        if self.hub.push_to and self.objective != "dpo":
            raise ValueError(
                f"hub.push_to uploads anchors, and objective={self.objective} makes none: leave it out"
            )
        pairs, given = OBJECTIVES[self.objective], SOURCES[self.data.source]
        if given is not None and pairs != given:
            wanted = "pairs" if pairs else "captioned images"
            raise ValueError(
                f"objective={self.objective} learns from {wanted}, which data.source={self.data.source} does not give"
            )
        if self.objective == "dpo" and not self.model.base:
            raise ValueError(
                "objective=dpo needs a base model; give model=sd15, model=sdxl, model=shapes or model.base=<pipeline folder or hub id>"
            )
        if self.objective == "pretrain" and not (
            self.model.base or (self.model.clip and self.model.vae)
        ):
            raise ValueError(
                "objective=pretrain needs model.base, or both model.clip and model.vae to start a new model from"
            )
        if self.objective == "pretrain" and self.finetune.method != "full":
            raise ValueError("objective=pretrain trains the whole network: add finetune=full")
        if self.objective == "preference" and not self.model.clip:
            raise ValueError("objective=preference needs model.clip=<CLIP folder> to start from")

    def run_name(self) -> str:
        if self.name:
            return self.name
        parts = [self.model.name, self.objective]
        if self.objective == "dpo":
            rule = "" if self.optim.rule == "inverse_beta" else f"-{self.optim.rule}"
            parts += [self.finetune.method, f"beta{self.dpo.beta:g}{rule}"]
        return "-".join([*parts, f"seed{self.seed}"])
