"""A LoRA anchor on the reference's own network.

It lies there under a name of ours, is silent unless asked, and is removed without a trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.lora_files import LoraWeights
from deradiff.models.families import family_of
from deradiff.models.family import unwrapped

OUR_PREFIX = "deradiff_"
"""How the names of anchors' adapters begin."""


class Place(NamedTuple):
    """Where a wrapped layer lies in the network."""

    parent: nn.Module
    child: str
    layer: Any


class Adapter:
    """A LoRA anchor attached to the pipeline's denoiser.

    Outside of `with adapter.on():` the network computes what it did before. Adapters that the user
    loaded keep working: alone for the reference, and together with this one for the anchor.

    Args:
        pipe: the pipeline.
        anchor: the LoRA's files.
        number: of the anchor, for the adapter's name.

    Attributes:
        denoiser: the network.
        name: of the adapter.
        layers: the layers that the adapter is in, by their path in the network.

    Raises:
        ValueError: before the network is touched, for a LoRA that does not fit it.
    """

    def __init__(self, pipe: Any, anchor: Anchor, number: int) -> None:
        family = family_of(pipe)
        self.name = f"{OUR_PREFIX}{number}"
        self.denoiser: Any = unwrapped(getattr(pipe, family.denoiser))
        weights = anchor.lora(pipe)
        anchor_name = f"the LoRA anchor {anchor.source}"
        pipeline_name = f"the {family.name} pipeline"
        _check_fits(self.denoiser, family.denoiser, weights, anchor_name, pipeline_name)

        # peft freezes what it wraps and changes which adapters are active: remember both
        trainable = [(p, p.requires_grad) for p in self.denoiser.parameters()]
        active = [(layer, layer.active_adapters[:]) for layer in lora_layers(self.denoiser)]
        self._load(pipe, family.denoiser, weights)
        self.layers = self._find_layers()
        self._folded: list[Place] = []
        for layer in self.layers.values():
            layer._active_adapter = []
            layer.lora_dropout[self.name].eval()
        for layer, names in active:
            layer._active_adapter = names
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    def _load(self, pipe: Any, prefix: str, weights: LoraWeights) -> None:
        """Add the adapter with the arguments of the pipelines' own `load_lora_weights`.

        So lam = 1 is the stock pipeline, bit for bit.
        """
        with warnings.catch_warnings():
            # Several LoRAs on one network are intended
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            self.denoiser.load_lora_adapter(
                dict(weights.state),
                prefix=prefix,
                adapter_name=self.name,
                metadata=weights.metadata,
                low_cpu_mem_usage=True,
                _pipeline=pipe,
            )

    def _find_layers(self) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for path, module in self.denoiser.named_modules():
            if isinstance(module, BaseTunerLayer) and self.name in module.scaling:
                layers[path] = module
        return layers

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Take the adapter off the network, except for the evaluations that want it.

        What is saved, compiled or evaluated otherwise is then the reference alone. Layers that also
        hold an adapter of the user's stay wrapped.
        """
        for path, layer in self.layers.items():
            if all(name.startswith(OUR_PREFIX) for name in layer.scaling):
                parent, _, child = path.rpartition(".")
                self._folded.append(Place(self.denoiser.get_submodule(parent), child, layer))
        for place in self._folded:
            place.parent._modules[place.child] = place.layer.base_layer
        hook = self.denoiser.register_state_dict_post_hook(hide_ours)
        try:
            yield
        finally:
            hook.remove()
            for place in self._folded:
                # If it is another module, somebody has wrapped the layer anew
                if place.parent._modules[place.child] is place.layer.base_layer:
                    place.parent._modules[place.child] = place.layer

    @contextmanager
    def on(self, scale: float | Tensor = 1.0) -> Iterator[None]:
        """The network with the adapter.

        Args:
            scale: multiplies the adapter's own scale: a number, or one for each row of the batch,
                (rows,).

        Raises:
            ValueError: where another LoRA was loaded while the pipeline is realigned.
        """
        self._follow_network()
        self._check_folded_places()
        modules = [(place, place.parent._modules[place.child]) for place in self._folded]
        before = [
            (layer, layer._active_adapter, layer._disable_adapters, layer.scaling[self.name])
            for layer in self.layers.values()
        ]

        # Assigned directly: peft's public switches would also change requires_grad at every step,
        # for the user's adapters, too
        for place in self._folded:
            place.parent._modules[place.child] = place.layer
        for layer in self.layers.values():
            others = [] if layer.disable_adapters else layer.active_adapters
            layer._active_adapter = [*others, self.name]
            layer._disable_adapters = False
            if not isinstance(scale, Tensor):
                layer.scaling[self.name] *= scale
        try:
            with self._scaled_by_row(scale) if isinstance(scale, Tensor) else nullcontext():
                yield
        finally:
            for layer, active, disabled, scaling in before:
                layer._active_adapter = active
                layer._disable_adapters = disabled
                layer.scaling[self.name] = scaling
            for place, module in modules:
                place.parent._modules[place.child] = module

    def _check_folded_places(self) -> None:
        for place in self._folded:
            module = place.parent._modules[place.child]
            if module is not place.layer and module is not place.layer.base_layer:
                raise ValueError(
                    "a LoRA was loaded while the pipeline is realigned: load it before, so that it "
                    "acts in reference and anchor"
                )

    def _follow_network(self) -> None:
        """Move the adapter to the device and precision of the network."""
        for layer in self.layers.values():
            base = layer.get_base_layer().weight
            ours = layer.lora_A[self.name].weight
            is_offloaded = base.device.type == "meta"
            is_in_place = (base.device, base.dtype) == (ours.device, ours.dtype)
            if is_offloaded or is_in_place:
                return
            layer.lora_A[self.name].to(base.device, base.dtype)
            layer.lora_B[self.name].to(base.device, base.dtype)

    @contextmanager
    def _scaled_by_row(self, scales: Tensor) -> Iterator[None]:
        """Each layer's scale times a column of numbers, one a row.

        peft multiplies the adapter's output by the scale, whatever that is.
        """

        def set_scale(layer: Any, inputs: tuple[Any, ...], scaling: float) -> None:
            column = scaling * scales.to(inputs[0].dtype)
            layer.scaling[self.name] = column.view(-1, *[1] * (inputs[0].ndim - 1))

        with ExitStack() as stack:
            for layer in self.layers.values():
                hook = partial(set_scale, scaling=layer.scaling[self.name])
                stack.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    @property
    def is_variant(self) -> bool:
        """Whether it is a DoRA or another LoRA whose effect is not one matrix beside the layer's."""
        return any(self.name in layer.lora_variant for layer in self.layers.values())

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """What the adapter adds to each layer's weight.

        Yields:
            The weight's name in the network without a LoRA, and alpha / rank times B A.
        """
        self._follow_network()
        for path, layer in self.layers.items():
            yield f"{path}.weight", layer.get_delta_weight(self.name)

    def check_rows(self) -> None:
        """Raises ValueError where rows of one batch cannot differ in this adapter."""
        if self.is_variant:
            raise ValueError(
                "batched=True needs a plain LoRA, and this one is a DoRA or another variant: remove "
                "batched=True"
            )
        if any(module._compiled_call_impl is not None for module in self.denoiser.modules()):
            raise ValueError(
                "batched=True and torch.compile do not go together, because compiled blocks do not "
                "see which row is whose: remove one of them"
            )

    def output(self, call: Callable[[], Any]) -> Any:
        """The anchor's output, from the reference's own forward."""
        with self.on():
            return call()

    def remove(self) -> None:
        """Take the adapter off, and unwrap the layers that hold no other."""
        for path, layer in self.layers.items():
            if self.denoiser.get_submodule(path) is not layer:
                continue  # somebody has wrapped it anew
            if list(layer.scaling) == [self.name]:
                self.denoiser.set_submodule(path, layer.base_layer)
            else:
                layer.delete_adapter(self.name)
        self.denoiser.peft_config.pop(self.name, None)
        if not self.denoiser.peft_config:
            del self.denoiser.peft_config
            vars(self.denoiser).pop("_hf_peft_config_loaded", None)  # the class says False


def hide_ours(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A hook on `state_dict`: the anchors' adapters are not saved.

    That matters where they share layers with adapters of the user's.
    """
    for key in [key for key in state if f".{OUR_PREFIX}" in key]:
        del state[key]


def lora_layers(denoiser: nn.Module) -> list[Any]:
    """The layers of a network that peft has wrapped."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def _check_fits(
    denoiser: nn.Module, prefix: str, weights: LoraWeights, anchor: str, pipeline: str
) -> None:
    """Raises ValueError where a LoRA names a layer, or has a size, that the network has not."""
    if any(layer.merged for layer in lora_layers(denoiser)):
        raise ValueError(
            "the pipeline has LoRA weights fused into it, which would hide the anchor's: call "
            "pipe.unfuse_lora() first"
        )
    modules = dict(denoiser.named_modules())
    for key, value in weights.state.items():
        path, _, part = key.removeprefix(f"{prefix}.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        if path not in modules:
            raise ValueError(
                f"{anchor} does not bind to {pipeline}, which has no layer {path}: give an anchor "
                "of its family"
            )

        # A reads the layer's input, B writes its output
        our_size = value.shape[1] if part == "A.weight" else value.shape[0]
        side = 1 if part == "A.weight" else 0
        layer_size = modules[path].weight.shape[side]
        if layer_size != our_size:
            raise ValueError(
                f"{anchor} does not fit {pipeline}: its layer {path} is for size {our_size}, the "
                f"pipeline's is {layer_size}"
            )
