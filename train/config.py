"""The config of the train stage: what is trained, from what data, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from configs.checks import at_most, check_seed, choice, not_negative, positive, section
from configs.paths import AUTOENCODER, CHECKPOINT, PIPELINE, check_path, check_prompts
from configs.settings import setting
from configs.tracking import TrackingConfig
from deradiff.command_line import command_of
from deradiff.training.objectives.registry import OBJECTIVES, ObjectiveSpec
from deradiff.training.options import DECAYS, LEARNING_RATE_RULES, OPTIMIZERS
from deradiff.training.shares import Shares

SOURCES = {  # data.source: whether it gives pairs; None: the columns of the table decide
    "table": None,
    "shapes_images": False,
    "shapes_pairs": True,
    "scored_pairs": True,
    "sampled_pairs": True,
}
SHAPES_REWARDS = ("vivid", "crisp")
DEFAULT_SCORER = "vivid"
MOST_WORKERS = 1024
LARGEST_RANK = 2**14
AUTO = "auto"  # optim.batch_size that follows from memory
DATA = "a parquet file, a folder of captioned images, or a data set of the hub such as org/name"


@dataclass
class ModelConfig:
    """The base model. Without one, a new small model is made from its parts."""

    name: str = setting("shapes", "what the model is called in the run's name")
    base: str | None = setting(
        None, "the base model: a pipeline folder, a hub id or asset:<name>; null: a new model"
    )
    revision: str | None = setting(None, "branch, tag or commit of model.base on the hub")
    vae: str | None = setting(
        None, "an autoencoder (folder or hub id) in place of the base model's own"
    )
    resolution: int = setting(512, "pixels of an image's side, a multiple of 8")
    clip: str | None = setting(None, "a CLIP folder that a new model or a scorer starts from")
    channels: list[int] = setting([48, 96], "of a new UNet, one number a level, multiples of 8")
    clip_width: int = setting(64, "width of a new CLIP")
    gradient_checkpointing: bool = setting(False, "less memory for one more forward pass a step")
    compile: bool = setting(
        False, "torch.compile the repeated blocks of the denoiser, and CUDA graphs on a GPU"
    )

    def __post_init__(self) -> None:
        if self.resolution <= 0 or self.resolution % 8:
            raise ValueError(f"model.resolution must be a multiple of 8, not {self.resolution}")
        if not self.channels or any(c <= 0 or c % 8 for c in self.channels):
            raise ValueError(
                f"model.channels must be multiples of 8, one for each level, not {self.channels}"
            )


@dataclass
class FinetuneConfig:
    """Which weights are trained."""

    method: str = setting("lora", "lora (an adapter) or full (all weights)")
    rank: int = setting(16, "rank of the LoRA")
    alpha: int = setting(16, "the LoRA's update is scaled by alpha / rank")
    targets: list[str] = setting(
        [], "layers that the LoRA adapts, by the end of their names; []: the attention layers"
    )

    def __post_init__(self) -> None:
        choice("finetune.method", self.method, ("lora", "full"))
        positive("finetune.rank", self.rank)
        at_most("finetune.rank", self.rank, LARGEST_RANK)
        positive("finetune.alpha", self.alpha)


@dataclass
class DataConfig:
    """Where examples come from, and how they are prepared."""

    source: str = setting(
        "table",
        "table reads data.path; shapes_images and shapes_pairs draw the shapes world; scored_pairs "
        "pairs and labels the images of data.path; sampled_pairs samples images and labels them",
    )
    path: str | None = setting(
        None, "a parquet file, a folder of captioned images, or a data set of the hub"
    )
    split: str = setting("train", "which split of a data set of the hub")
    revision: str | None = setting(None, "branch, tag or commit of data.path on the hub")
    limit: int | None = setting(None, "use the first so many usable rows only; null: all")
    count: int = setting(4000, "rows that are drawn, or pairs that are sampled or labelled")
    scorer: Any = setting(  # str | dict[str, float], a union that Hydra's schemas do not have
        DEFAULT_SCORER,
        "what labels pairs: vivid or crisp for shapes_pairs, any scorer for the others; a weighted "
        "sum of several: data.scorer={vivid:0.5,crisp:0.5}",
    )
    scorer_checkpoint: str | None = setting(None, "the scorer's weights; null: its published ones")
    caption_dropout: float = setting(0.1, 'share of examples whose caption is replaced by ""')
    flip: bool = setting(False, "mirror all images of an example, every other time")
    max_broken: float = setting(0.01, "share of rows that may hold images that cannot be decoded")
    prompts: str | None = setting(
        None, f"of sampled_pairs: a file of prompts, or a set that {command_of('sample')} knows"
    )
    pipeline: str | None = setting(None, "samples sampled_pairs; null: model.base")
    steps: int = setting(50, "steps of the sampler of sampled_pairs")
    guidance_scale: float = setting(7.5, "of sampled_pairs")
    batch_size: int = setting(8, "images that sampled_pairs samples at once")
    temperature: float = setting(
        0.0, "of the labels' Bradley-Terry draw, in units of the scorer; 0: the higher score wins"
    )
    dry_run: bool = setting(False, "count rows, show examples, estimate the run's needs, and stop")
    streaming: bool = setting(False, "read parquet where it lies, without a copy on the disk")
    cache: bool = setting(True, "encode images and captions once, and keep them in runs/cache")
    workers: int = setting(0, "processes that load data")

    def __post_init__(self) -> None:
        # Values that are wrong by themselves.
        choice("data.source", self.source, SOURCES)
        for key in ("count", "steps", "batch_size"):
            positive(f"data.{key}", getattr(self, key))
        for key in ("guidance_scale", "temperature"):
            not_negative(f"data.{key}", getattr(self, key))
        not_negative("data.workers", self.workers)
        at_most("data.workers", self.workers, MOST_WORKERS)
        if self.limit is not None:
            positive("data.limit", self.limit)
        for key in ("caption_dropout", "max_broken"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key} must lie in [0, 1], not {getattr(self, key)}")

        self.scorer = _checked_scorer(self.scorer)
        self._check_labels()

        # What a source needs.
        if self.source == "sampled_pairs" and not self.prompts:
            raise ValueError(
                "data.prompts is missing; give a file of prompts, or a set that "
                f"{command_of('sample')} knows"
            )
        reads_path = self.source in ("table", "scored_pairs")
        if self.path and not reads_path:
            raise ValueError(
                f"data.path={self.path} is not read by data.source={self.source}: give data=table "
                f"data.path={self.path}, or remove it"
            )
        if reads_path and not self.path:
            raise ValueError(
                "data.path is missing; give a parquet file, a folder of captioned images, "
                "or a hub data set such as org/name"
            )

    def _check_labels(self) -> None:
        """Refuse a scorer that does not fit the source, or the checkpoint."""
        unknown = [name for name in self.scorer_weights if name not in SHAPES_REWARDS]
        if self.source == "shapes_pairs" and unknown:
            raise ValueError(
                f"data.source=shapes_pairs is labelled by vivid or crisp, not {unknown[0]!r}; "
                "other scorers take data=scored_pairs"
            )
        if "judge" in self.scorer_weights:
            raise ValueError(
                "data.scorer=judge is a model behind a server, which scores images in "
                f"{command_of('eval')}: give a scorer that runs here, such as data.scorer=pickscore"
            )
        if isinstance(self.scorer, dict) and self.scorer_checkpoint:
            raise ValueError(
                "data.scorer_checkpoint is the weights of one scorer, and data.scorer is a sum of "
                "several: remove data.scorer_checkpoint"
            )

    @property
    def scorer_weights(self) -> dict[str, float]:
        """The weight of each scorer in the reward; a plain scorer has the weight 1."""
        return dict(self.scorer) if isinstance(self.scorer, dict) else {self.scorer: 1.0}

    @property
    def scorer_name(self) -> str:
        """The scorer's name in names of files: `vivid`; of a sum `crisp0.5-vivid0.5`."""
        if isinstance(self.scorer, str):
            return self.scorer
        parts = [f"{name}{weight}".removesuffix(".0") for name, weight in self.scorer.items()]
        return "-".join(parts)


def _checked_scorer(scorer: Any) -> str | dict[str, float]:
    """The scorer's name, or the weights of several scorers in the order of their names.

    Raises:
        ValueError: for what is neither, and for weights that are not finite numbers above 0.
    """
    if isinstance(scorer, str):
        return scorer
    if not isinstance(scorer, Mapping) or not scorer:
        raise ValueError(
            "data.scorer must be a scorer's name or the weights of several, as in "
            f"data.scorer={{vivid:0.5,crisp:0.5}}, not {scorer!r}"
        )
    weights = {}
    for name, weight in sorted(scorer.items(), key=lambda item: str(item[0])):
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number:
            raise ValueError(f"data.scorer.{name} must be a number above 0, not {weight!r}")
        positive(f"data.scorer.{name}", weight)
        weights[str(name)] = float(weight)
    return weights


@dataclass
class DPOConfig:
    """The objective `dpo`."""

    beta: float = setting(
        2000.0,
        "the KL strength, in the convention mean-half: diffusers' example calls half of it beta",
    )
    reference_errors: bool = setting(
        True, "keep the reference's errors in runs/cache, for runs with another beta to read"
    )

    safeguard: bool = setting(
        False,
        "scale the loser's gradient so that the winner's error does not rise (Diffusion-SDPO)",
    )
    sft: float = setting(
        0.0, "weight of the winner's own error beside the loss, in units of beta / 2; 0: none"
    )

    def __post_init__(self) -> None:
        positive("dpo.beta", self.beta)
        not_negative("dpo.sft", self.sft)

    @property
    def additions(self) -> list[str]:
        """What is added to the loss of Diffusion-DPO, for the card."""
        added = ["safeguard"] if self.safeguard else []
        return [*added, f"sft {self.sft:g}"] if self.sft else added


@dataclass
class OptimConfig:
    """The optimiser and its learning rate."""

    name: str = setting("adamw", " | ".join(OPTIMIZERS))
    lr: float = setting(1e-8, "learning rate: of a pair if per_pair is set, else of a step")
    per_pair: bool = setting(
        True, "multiply lr by the pairs of a step, as the published launchers do"
    )
    rule: str = setting(
        "inverse_beta",
        "inverse_beta: multiply lr by 2000 / beta, as the paper does; fixed: as its code",
    )
    warmup: int = setting(0, "steps of linear warm-up")
    decay: str = setting("constant", "after the warm-up: constant, or cosine to 0 at the last step")
    weight_decay: float = setting(1e-2, "how fast weights shrink")
    clip: float = setting(1.0, "largest norm of the gradient; 0: not clipped")
    ema: float = setting(
        0.0, "decay of a moving average of the weights, saved in their place; 0: none"
    )
    pairs_per_step: int = setting(
        2048, "pairs of one optimiser step on all GPUs; accumulation follows from it"
    )
    batch_size: Any = setting(  # int | str, a union that Hydra's schemas do not have
        1, "pairs of one forward pass on one GPU; auto: as many as fit, a power of two"
    )

    def __post_init__(self) -> None:
        choice("optim.name", self.name, OPTIMIZERS)
        choice("optim.rule", self.rule, LEARNING_RATE_RULES)
        choice("optim.decay", self.decay, DECAYS)
        for key in ("lr", "pairs_per_step"):
            positive(f"optim.{key}", getattr(self, key))
        is_number = isinstance(self.batch_size, int) and not isinstance(self.batch_size, bool)
        if self.batch_size != AUTO and not (is_number and self.batch_size > 0):
            raise ValueError(
                f"optim.batch_size must be a number of pairs or auto, not {self.batch_size}"
            )
        at_most("optim.lr", self.lr, 1.0)
        for key in ("warmup", "weight_decay", "clip"):
            not_negative(f"optim.{key}", getattr(self, key))
        if not 0 <= self.ema < 1:
            raise ValueError(f"optim.ema must lie in [0, 1), not {self.ema}")
        self.shares(ranks=1)

    def shares(self, ranks: int) -> Shares:
        """How the ranks share the pairs of a step; one by one, while the batch size is not chosen.

        Raises:
            ValueError: where they cannot.
        """
        with section("optim"):
            batch_size = 1 if self.batch_size == AUTO else self.batch_size
            return Shares(self.pairs_per_step, batch_size, ranks)


@dataclass
class PanelConfig:
    """Images of the anchor while it is trained."""

    every: int = setting(500, "steps between two panels; the last step has one too; 0: no panels")
    prompts: list[str] = setting([], "one a row of a panel; []: the first captions of the data")
    lambdas: list[float] = setting([0.0, 1.0, 2.0], "one a column of a panel")
    steps: int = setting(25, "steps of a panel's sampler")
    guidance_scale: float | None = setting(None, "of a panel; null: the family's own")

    def __post_init__(self) -> None:
        not_negative("panel.every", self.every)
        if self.guidance_scale is not None:
            not_negative("panel.guidance_scale", self.guidance_scale)
        positive("panel.steps", self.steps)
        if not self.lambdas:
            raise ValueError(
                "panel.lambdas is empty: give at least one, as in panel.lambdas=[0,1,2]"
            )
        for lam in self.lambdas:
            if not math.isfinite(lam):
                raise ValueError(f"panel.lambdas must be finite numbers, not {lam}")


@dataclass
class HubConfig:
    """The upload of a finished anchor."""

    push_to: str | None = setting(None, "the hub repository, user/name; null: no upload")


@dataclass
class TrainConfig:
    """One run of the train stage."""

    USUAL: ClassVar[tuple[str, ...]] = (
        "dpo.beta",
        "steps",
        "data.path",
        "model.base",
        "optim.lr",
        "optim.pairs_per_step",
        "optim.batch_size",
        "seed",
        "objective",
        "name",
    )
    INSTEAD_OF: ClassVar[dict[str, str]] = {
        "accumulation": "give optim.pairs_per_step, from which accumulation follows",
        "gradient_accumulation_steps": "give optim.pairs_per_step, from which accumulation follows",
    }
    objective: str = setting("dpo", " | ".join(OBJECTIVES))
    model: ModelConfig = field(default_factory=ModelConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="shapes_pairs"))
    dpo: DPOConfig = field(default_factory=DPOConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    panel: PanelConfig = field(default_factory=PanelConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    steps: int = setting(2000, "optimiser steps")
    seed: int = setting(0, "fixes the order of the data, all noise, and new weights")
    precision: str = setting("no", "no (float32), fp16 or bf16")
    cpu: bool = setting(False, "leave GPUs alone")
    ranks_timeout: float = setting(
        600.0,
        "seconds after which a rank that is silent, or never came, ends the others",
    )
    log_every: int = setting(10, "steps between two lines of metrics.jsonl")
    checkpoint_every: int = setting(200, "steps between two checkpoints")
    keep_last: int = setting(2, "how many of the newest checkpoints stay")
    keep_best: int = setting(0, "how many checkpoints of the lowest loss stay")
    name: str | None = setting(
        None,
        "folder of the run below runs/train; null: model, objective, method, beta, the weights of "
        "several scorers, and seed",
    )
    runs: str = setting("runs", "folder of all runs")

    def __post_init__(self) -> None:
        # Values that are wrong by themselves.
        choice("objective", self.objective, OBJECTIVES)
        choice("precision", self.precision, ("no", "fp16", "bf16"))
        for key in ("steps", "ranks_timeout", "log_every", "checkpoint_every", "keep_last"):
            positive(key, getattr(self, key))
        check_seed("seed", self.seed)
        not_negative("keep_best", self.keep_best)

        # What does not fit the objective.
        if self.hub.push_to and not self.spec.makes_anchor:
            raise ValueError(
                f"hub.push_to uploads anchors, and objective={self.objective} makes none: remove "
                "hub.push_to"
            )
        if self.optim.batch_size == AUTO and not self.spec.has_reference:
            raise ValueError(
                "optim.batch_size=auto is for objective=dpo, whose memory can be estimated: give "
                "optim.batch_size=<number>"
            )
        self._check_data()
        self._check_model()

    def _check_data(self) -> None:
        gives_pairs = SOURCES[self.data.source]
        if gives_pairs is not None and gives_pairs != self.spec.needs_pairs:
            wanted = "pairs" if self.spec.needs_pairs else "captioned images"
            raise ValueError(
                f"objective={self.objective} learns from {wanted}, which "
                f"data.source={self.data.source} does not give"
            )

    def _check_model(self) -> None:
        """Refuse a config that lacks what the objective starts from."""
        # A base model, or what a new model is made from.
        model = self.model
        if self.spec.needs_base and not model.base:
            raise ValueError(
                f"objective={self.objective} needs a base model; give model=sd15, model=sdxl, "
                "model=shapes or model.base=<pipeline folder or hub id>"
            )
        has_parts = bool(model.clip and model.vae)
        if self.spec.needs_parts and not model.base and not has_parts:
            raise ValueError(
                f"objective={self.objective} needs model.base, "
                "or both model.clip and model.vae to start a new model from"
            )

        # Which weights are trained, and from where they start.
        if self.spec.needs_full and self.finetune.method != "full":
            raise ValueError(
                f"objective={self.objective} trains the whole network: add finetune=full"
            )
        if self.spec.needs_clip and not model.clip:
            raise ValueError(
                f"objective={self.objective} needs model.clip=<CLIP folder> to start from"
            )

    def check_paths(self) -> None:
        """Refuse local paths where nothing is.

        Raises:
            ValueError: with what to type.
        """
        model = self.model
        data = self.data
        check_path("model.base", model.base, PIPELINE, self.runs)
        check_path("model.vae", model.vae, AUTOENCODER, self.runs)
        check_path("model.clip", model.clip, "a CLIP folder", depth=0)
        check_path("data.pipeline", data.pipeline, PIPELINE, self.runs)
        is_file = str(data.path).endswith((".parquet", ".csv", ".jsonl"))
        check_path("data.path", data.path, DATA, self.runs, depth=0 if is_file else 2)
        check_path("data.scorer_checkpoint", data.scorer_checkpoint, CHECKPOINT, self.runs, 99)
        if data.prompts:
            check_prompts("data.prompts", data.prompts)

    @property
    def spec(self) -> ObjectiveSpec:
        """What is known of the objective."""
        return OBJECTIVES[self.objective]

    @property
    def settings(self) -> Any:
        """The objective's own section, such as `dpo`; None where it has none."""
        return getattr(self, self.spec.section) if self.spec.section else None

    @property
    def beta(self) -> float | None:
        """The objective's beta; None where it has none."""
        return self.settings.beta if self.spec.uses_beta else None

    @property
    def stores_reference_errors(self) -> bool:
        """Whether the reference's errors are kept in runs/cache."""
        return self.spec.has_reference and self.settings.reference_errors

    def run_name(self) -> str:
        """The run's folder below runs/train."""
        if self.name:
            return self.name
        parts = [self.model.name, self.objective]
        if self.spec.makes_anchor:
            parts.append(self.finetune.method)
        if self.beta is not None:
            rule = "" if self.optim.rule == "inverse_beta" else f"-{self.optim.rule}"
            parts.append(f"beta{self.beta:g}{rule}")
        # Anchors of other rewards are other runs.
        if self.spec.makes_anchor and self.data.scorer != DEFAULT_SCORER:
            parts.append(self.data.scorer_name)
        return "-".join([*parts, f"seed{self.seed}"])
