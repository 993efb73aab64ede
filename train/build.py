"""From a config to the networks and the objective of a run.

`check` finds a user's mistakes before a weight is loaded. `RunParts` loads what the objective asks
for: the pipeline that it trains in, its cache, the reference's errors. A pipeline loads what it
needs and no more: one encodes the data, another trains, a third one samples.
"""

from __future__ import annotations

import os
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from peft import LoraConfig

from configs.checks import section
from deradiff.anchors.anchor import AnchorCard
from deradiff.assets import locate
from deradiff.data.cache import Cache, NotFiniteError, encodings_key
from deradiff.data.encoders import encoders_key, encoders_without_weights, source_key
from deradiff.data.pairs import CaptionedImages, Examples
from deradiff.data.reference_errors import ReferenceErrors, network_digest, reference_key
from deradiff.files import nearest_folder
from deradiff.hub import check_push
from deradiff.models.autoencoders import overflows
from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.cuda_graphs import enable_gradient_checkpointing
from deradiff.models.families import family_of
from deradiff.models.family import Family
from deradiff.models.flops import meta_denoiser
from deradiff.scorers import check_scorer
from deradiff.terminal import say
from deradiff.training import zero
from deradiff.training.noising import noising_of
from deradiff.training.objectives.base import Objective
from deradiff.training.options import check_optimizer
from deradiff.worlds import networks
from train.config import TrainConfig

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def base_model(config: TrainConfig) -> BaseModel | None:
    """The base model of a run; None where a new model is made."""
    model = config.model
    if not model.base:
        return None
    return BaseModel(model.base, model.revision, model.vae)


def check(config: TrainConfig, base: BaseModel | None, run_dir: Path) -> None:
    """Read the indexes of everything that a run needs; no weight is loaded.

    Raises:
        ValueError: where something is missing or does not fit.
    """
    # What the run needs besides its model.
    _check_writable(run_dir)
    check_optimizer(config.optim.name)
    _check_launch(config)
    if config.hub.push_to:
        with section("hub"):
            check_push(config.hub.push_to)
    if config.data.source in ("scored_pairs", "sampled_pairs"):
        for name in config.data.scorer_weights:
            check_scorer(name, config.data.scorer_checkpoint)

    # The model that it starts from, and the parts of it that the config replaces.
    clip = config.model.clip
    if clip and not (Path(locate(clip)) / "config.json").is_file():
        raise ValueError(f"model.clip={clip} is no model folder: it has no config.json")
    if base is None and config.model.vae:
        with section("model"):
            check_autoencoder(config.model.vae)
    if config.data.pipeline:
        BaseModel(config.data.pipeline).check()
    if base is not None:
        with section("model"):
            base.check()
        if config.spec.trains_denoiser and config.finetune.method == "lora":
            _check_targets(config, base)


def _check_writable(run_dir: Path) -> None:
    """Ask the nearest folder that exists, since a run that is refused should make no folder."""
    nearest = nearest_folder(run_dir)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"{run_dir} cannot be written, because of {nearest}: give runs=<a folder of yours>"
        )


def _check_launch(config: TrainConfig) -> None:
    """Refuse what DeepSpeed cannot do, where the run was launched with it."""
    if not zero.asked_for():
        return
    if config.cpu:
        raise ValueError(
            "cpu=true trains without DeepSpeed, with which this run was launched: remove cpu=true "
            "(DS_ACCELERATOR=cpu in the environment has DeepSpeed train on CPUs)"
        )
    zero.check_deepspeed(config.optim.name, config.precision)
    if find_spec("deepspeed") is None:
        raise ValueError(
            "this run was launched with DeepSpeed, which is not installed: type "
            "pip install 'deradiff[deepspeed]'"
        )


def _check_targets(config: TrainConfig, base: BaseModel) -> None:
    """Check the layers that a LoRA adapts, on a network without weights."""
    # The layers that can be adapted.
    layers = []
    for name, module in meta_denoiser(base.denoiser_config).named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            layers.append(name)

    # A target is the name of a layer, or the end of it.
    for target in _lora_targets(config, base.family):
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(base.family.lora_targets)
            raise ValueError(
                f"finetune.targets: {target} matches no layer of {base.source}; "
                f"those of the family are {known}"
            )


def _lora_targets(config: TrainConfig, family: Family) -> list[str]:
    return list(config.finetune.targets or family.lora_targets)


def lora_config(config: TrainConfig, family: Family) -> LoraConfig:
    """The adapter of a LoRA run, as peft takes it."""
    return LoraConfig(
        r=config.finetune.rank,
        lora_alpha=config.finetune.alpha,
        target_modules=_lora_targets(config, family),
        init_lora_weights="gaussian",
    )


def add_lora(network: Any, lora: LoraConfig) -> None:
    """Add a trainable adapter to a network, its weights in float32."""
    network.add_adapter(lora)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def frozen_dtype(config: TrainConfig) -> torch.dtype:
    """The precision of networks that are not trained.

    It is the run's, except in a pipeline that will be saved, which is float32 throughout.
    """
    return torch.float32 if config.spec.saves_pipeline else DTYPES[config.precision]


def new_pipeline(config: TrainConfig) -> Any:
    """A new small model around the trained parts that the config names."""
    model = config.model
    clip, tokenizer, _ = networks.load_clip(locate(str(model.clip)))
    vae = AutoencoderKL.from_pretrained(locate(str(model.vae)))
    text_encoder = networks.text_tower(clip)
    channels = tuple(model.channels)
    return networks.make_pipeline(text_encoder, tokenizer, vae, model.resolution, channels)


def encoding_pipeline(config: TrainConfig, base: BaseModel | None, device: torch.device) -> Any:
    """The pipeline that encodes images and captions, on the device, without its denoiser."""
    if base is None:
        return new_pipeline(config).to(device)
    pipe = base.load_pipeline(frozen_dtype(config), {base.family.denoiser: None})
    return pipe.to(device)


def training_pipeline(config: TrainConfig, base: BaseModel | None, encoders: bool) -> Any:
    """The pipeline to train in: the base model, or a new one.

    Frozen networks are in the run's precision. A network that is trained as a whole is read in
    float32: what it learns is then a difference from the weights that sampling mixes it with.

    Args:
        config: of the run.
        base: the base model; None: a new model.
        encoders: whether the run encodes images and captions itself. Without, the encoders are
            left out, unless the pipeline will be saved.
    """
    if base is None:
        return new_pipeline(config)
    # The components that are not loaded as they are published.
    dtype = frozen_dtype(config)
    parts: dict[str, Any] = {}
    if not encoders and not config.spec.saves_pipeline:
        parts = encoders_without_weights(base, dtype)
    if config.finetune.method == "full" and dtype != torch.float32:
        parts[base.family.denoiser] = base.load_denoiser(torch.float32)
    return base.load_pipeline(dtype, parts)


def run_encoders_key(config: TrainConfig, base: BaseModel | None) -> str:
    """A text that names all that the encodings depend on besides the data; no weight is loaded."""
    if base is None:
        clip = source_key(str(config.model.clip))
        vae = source_key(str(config.model.vae))
        return f"{clip} {vae} {frozen_dtype(config)}"
    dtype = frozen_dtype(config)
    key = f"{encoders_key(base)} {dtype}"
    return f"{key}, autoencoder in float32" if overflows(base.describe_vae(dtype)) else key


class RunParts:
    """What a run of the train stage offers to its objective, loaded when it is asked for.

    See `deradiff.training.objectives.base.Parts` for the attributes.

    Args:
        config: of the run.
        base: its base model; None: a new model is made.
        data: its examples.
        accelerator: of the run.
        card: of the anchor that the run makes; None: it makes none.
    """

    def __init__(
        self,
        config: TrainConfig,
        base: BaseModel | None,
        data: CaptionedImages,
        accelerator: Accelerator,
        card: AnchorCard | None,
    ) -> None:
        self.config = config
        self.base = base
        self.data = data
        self.accelerator = accelerator
        self.card = card
        self.resolution = config.model.resolution
        self.clip_width = config.model.clip_width
        self.caption_dropout = config.data.caption_dropout
        self.flip = config.data.flip
        self.settings = config.settings

    @property
    def clip(self) -> tuple[Any, Any, Any]:
        """The CLIP that `model.clip` names, its tokenizer and its image processor."""
        return networks.load_clip(locate(str(self.config.model.clip)))

    @cached_property
    def cache(self) -> Cache | None:
        """The cache of the run's data, complete; None: `data.cache=false`. Collective.

        Raises:
            ValueError: where the autoencoder's latents are not finite.
        """
        if not self.config.data.cache:
            return None
        folder = Path(self.config.runs) / "cache"
        cache = Cache(folder, self._encoders_key, self.data, self.resolution, self.flip)

        # New weights are the same, whether there was something to encode or not.
        with torch.random.fork_rng(devices=[]):
            try:
                cache.build(self._encoding_pipeline, self.accelerator.is_main_process)
            except NotFiniteError as error:
                raise ValueError(f"{error} (precision=bf16, model.vae=<autoencoder>)") from error
        self.accelerator.wait_for_everyone()
        return cache

    @cached_property
    def _encoders_key(self) -> str:
        return run_encoders_key(self.config, self.base)

    def _encoding_pipeline(self) -> Any:
        return encoding_pipeline(self.config, self.base, self.accelerator.device)

    @cached_property
    def pipe(self) -> Any:
        """The pipeline to train in. Its denoiser has a LoRA, or is trained as a whole."""
        # The data is encoded first, by a pipeline that is gone when this one is loaded.
        config = self.config
        pipe = training_pipeline(config, self.base, encoders=self.cache is None)

        # What is trained.
        family = family_of(pipe)
        network = getattr(pipe, family.denoiser)
        if config.finetune.method == "full":
            network.requires_grad_(True)
        else:
            network.requires_grad_(False)
            add_lora(network, lora_config(config, family))

        # How it is computed.
        if config.model.gradient_checkpointing:
            enable_gradient_checkpointing(network)
        if config.model.compile:
            network.compile_repeated_blocks()
        return pipe

    @cached_property
    def reference_errors(self) -> tuple[ReferenceErrors | None, bool]:
        """The store of the reference's errors, and whether it holds all that the run needs.

        Collective: the store counts as complete if all ranks find it so. They read it at different
        moments, and another run may be writing to it.
        """
        if not self.config.stores_reference_errors:
            return None, False

        # The store is named by all that the errors depend on.
        config = self.config
        network = getattr(self.pipe, family_of(self.pipe).denoiser)
        key = reference_key(
            network_digest(network),
            encodings_key(self._encoders_key, self.data, self.resolution),
            noising_of(self.pipe.scheduler).key,
            config.seed,
            config.data.caption_dropout,
            config.data.flip,
            f"{config.precision} {self.accelerator.device.type}",
        )
        errors = ReferenceErrors(Path(config.runs) / "cache", key)

        # Does it hold every example of the run?
        examples = Examples(self.data, config.seed, in_blocks=self.cache is None)
        pairs = config.steps * config.optim.pairs_per_step
        covered = float(errors.covers(*examples.span(0, pairs)))

        # All ranks have to agree.
        on_device = torch.tensor(covered, device=self.accelerator.device)
        complete = bool(self.accelerator.reduce(on_device, "mean") == 1)
        if complete:
            say(
                "train: the reference's errors are all known from an earlier run, so the "
                "reference is not evaluated",
                is_main=self.accelerator.is_main_process,
            )
        return errors, complete


def make_objective(parts: RunParts) -> Objective:
    """The objective of a run, its networks ready to train."""
    torch.manual_seed(parts.config.seed)  # the initial weights of new networks
    return parts.config.spec.load().from_parts(parts)
