"""A LoRA anchor on the reference's own network: there under a name of ours, silent unless asked, and removed without a trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.lora_files import LoraWeights
from deradiff.models.families import family_of
from deradiff.models.family import unwrapped

OURS = "deradiff_"  # how the adapters of anchors are called


class Adapter:
    """A LoRA anchor attached to the pipeline's denoiser. Outside `with adapter.on():` the network computes what it did before.

    Adapters that the user loaded keep working, alone for the reference and together with this one for the anchor.
    Raises ValueError, before the network is touched, for a LoRA that does not fit it.
    """

    def __init__(self, pipe: Any, anchor: Anchor, number: int) -> None:
        name, family = f"{OURS}{number}", family_of(pipe)
        self.denoiser: Any = unwrapped(getattr(pipe, family.denoiser))
        self.name = name
        weights = anchor.lora(pipe)
        _check_fits(
            self.denoiser,
            family.denoiser,
            weights,
            f"the LoRA anchor {anchor.source}",
            f"the {family.name} pipeline",
        )
        trainable = [
            (parameter, parameter.requires_grad) for parameter in self.denoiser.parameters()
        ]
        active = [(layer, layer.active_adapters[:]) for layer in lora_layers(self.denoiser)]
        # The arguments of the pipelines' own `load_lora_weights`, so that lam = 1 is the stock pipeline bit for bit.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config`"
            )  # several LoRAs on one network are meant
            self.denoiser.load_lora_adapter(
                dict(weights.state),
                prefix=family.denoiser,
                adapter_name=name,
                metadata=weights.metadata,
                low_cpu_mem_usage=True,
                _pipeline=pipe,
            )
        wrapped: list[tuple[str, Any]] = [
            (path, m) for path, m in self.denoiser.named_modules() if isinstance(m, BaseTunerLayer)
        ]
        self.layers: dict[str, Any] = {
            path: layer for path, layer in wrapped if name in layer.scaling
        }  # by their place in the network
        self._places: list[
            tuple[nn.Module, str, Any]
        ] = []  # parent, name there, and layer, of those that are folded
        for layer in self.layers.values():
            layer._active_adapter = []
            layer.lora_dropout[name].eval()
        for layer, names in active:
            layer._active_adapter = names
        for parameter, requires_grad in trainable:  # peft freezes what it wraps
            parameter.requires_grad_(requires_grad)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Off the network but for the evaluations that want the adapter: what is saved, compiled or evaluated else is the reference alone.

        Layers that hold an adapter of the user's, too, stay wrapped.
        """
        for path, layer in self.layers.items():
            if all(name.startswith(OURS) for name in layer.scaling):
                where, _, child = path.rpartition(".")
                self._places.append((self.denoiser.get_submodule(where), child, layer))
        for parent, child, layer in self._places:
            parent._modules[child] = layer.base_layer
        hook = self.denoiser.register_state_dict_post_hook(hide_ours)
        try:
            yield
        finally:
            hook.remove()
            for parent, child, layer in self._places:
                if parent._modules[child] is layer.base_layer:  # else somebody wrapped it anew
                    parent._modules[child] = layer

    @contextmanager
    def on(self, strength: float | Tensor = 1.0) -> Iterator[None]:
        """The network with the adapter, its scale multiplied by `strength`: a number, or one for each row of the batch, (rows,)."""
        self._follow()
        # Assigned directly: peft's public switches also flip requires_grad, for the user's adapters too, at every step.
        before = [
            (layer, layer._active_adapter, layer._disable_adapters, layer.scaling[self.name])
            for layer in self.layers.values()
        ]
        modules = [(parent, child, parent._modules[child]) for parent, child, _ in self._places]
        for (parent, child, layer), (*_, there) in zip(self._places, modules):
            if there is not layer and there is not layer.base_layer:
                raise ValueError(
                    "a LoRA was loaded while the pipeline is realigned: load it before, so that it acts in reference and anchor"
                )
            parent._modules[child] = layer
        for layer in self.layers.values():
            others = [] if layer.disable_adapters else layer.active_adapters
            layer._active_adapter, layer._disable_adapters = [*others, self.name], False
            if not isinstance(strength, Tensor):
                layer.scaling[self.name] *= strength
        try:
            with self._row_by_row(strength) if isinstance(strength, Tensor) else nullcontext():
                yield
        finally:
            for layer, active, disabled, scale in before:
                layer._active_adapter, layer._disable_adapters, layer.scaling[self.name] = (
                    active,
                    disabled,
                    scale,
                )
            for parent, child, module in modules:
                parent._modules[child] = module

    def _follow(self) -> None:
        """Take the adapter to where the pipeline has been moved, and to its precision."""
        for layer in self.layers.values():
            weight, ours = layer.get_base_layer().weight, layer.lora_A[self.name].weight
            if weight.device.type == "meta" or (weight.device, weight.dtype) == (
                ours.device,
                ours.dtype,
            ):
                return  # offloaded layer by layer, or all as it should be
            layer.lora_A[self.name].to(weight.device, weight.dtype)
            layer.lora_B[self.name].to(weight.device, weight.dtype)

    @contextmanager
    def _row_by_row(self, strengths: Tensor) -> Iterator[None]:
        """Multiply each layer's scale by a column of strengths: peft multiplies the adapter's output by it, whatever it is."""

        def scale(layer: Any, inputs: tuple[Any, ...], scaling: float) -> None:
            column = scaling * strengths.to(inputs[0].dtype)
            layer.scaling[self.name] = column.view(-1, *[1] * (inputs[0].ndim - 1))

        with ExitStack() as stack:
            for layer in self.layers.values():
                hook = partial(scale, scaling=layer.scaling[self.name])
                stack.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    @property
    def variant(self) -> bool:
        """Whether this is a DoRA or another LoRA whose effect is not one matrix beside the layer's own."""
        return any(self.name in layer.lora_variant for layer in self.layers.values())

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """What the adapter adds to each layer's weight: (the weight's name in the network without a LoRA, alpha / rank B A)."""
        self._follow()
        for path, layer in self.layers.items():
            yield f"{path}.weight", layer.get_delta_weight(self.name)

    def check_rows(self) -> None:
        """ValueError where the rows of one batch cannot differ in this adapter."""
        if self.variant:
            raise ValueError(
                "batched=True needs a plain LoRA, and this one is a DoRA or another variant: leave batched away"
            )
        if any(module._compiled_call_impl is not None for module in self.denoiser.modules()):
            raise ValueError(
                "batched=True and torch.compile do not go together: compiled blocks would not see whose row is whose; leave one away"
            )

    def output(self, call: Callable[[], Any]) -> Any:
        """The anchor's output, from the reference's own forward."""
        with self.on():
            return call()

    def remove(self) -> None:
        """Take the adapter off, and unwrap the layers that have no other."""
        for path, layer in self.layers.items():
            if self.denoiser.get_submodule(path) is not layer:  # somebody wrapped it anew
                continue
            if list(layer.scaling) == [self.name]:
                self.denoiser.set_submodule(path, layer.base_layer)
            else:
                layer.delete_adapter(self.name)
        self.denoiser.peft_config.pop(self.name, None)
        if not self.denoiser.peft_config:
            del self.denoiser.peft_config
            vars(self.denoiser).pop("_hf_peft_config_loaded", None)  # of the class: False


def hide_ours(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A hook on `state_dict`: the anchors' adapters are no part of what is saved, also where they share layers with the user's."""
    for key in [key for key in state if f".{OURS}" in key]:
        del state[key]


def lora_layers(denoiser: nn.Module) -> list[Any]:
    """The layers of a network that peft has wrapped."""
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def _check_fits(
    denoiser: nn.Module, prefix: str, weights: LoraWeights, anchor: str, pipeline: str
) -> None:
    if any(layer.merged for layer in lora_layers(denoiser)):
        raise ValueError(
            "the pipeline has LoRA weights fused into it, which would hide the anchor's: call pipe.unfuse_lora() first"
        )
    modules = dict(denoiser.named_modules())
    for key, value in weights.state.items():
        path, _, part = key.removeprefix(f"{prefix}.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        if path not in modules:
            raise ValueError(
                f"{anchor} does not bind to {pipeline}, which has no layer {path}: give an anchor of its family"
            )
        side, size = (1, value.shape[1]) if part == "A.weight" else (0, value.shape[0])
        weight = modules[path].weight
        if weight.shape[side] != size:
            raise ValueError(
                f"{anchor} does not fit {pipeline}: its layer {path} is for size {size}, the pipeline's is {weight.shape[side]}"
            )
