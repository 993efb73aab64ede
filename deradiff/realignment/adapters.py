"""A LoRA anchor on the reference's own network.

It is attached under a name of ours, does nothing unless it is switched on, and is removed without a
trace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.lora_files import LoraWeights
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import pipeline_label
from deradiff.realignment.slots import LOADING

PREFIX = "deradiff_"
"""How the names of the anchors' adapters begin."""

FUSED_PARTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""The layers that attention does not use where its projections are fused."""

HOTSWAP = "_prepare_lora_hotswap_kwargs"
"""Where diffusers keeps what `enable_lora_hotswap` was told."""


class Adapter:
    """A LoRA anchor attached to the pipeline's denoiser.

    The network computes what it did before, except inside `with adapter.active():`. Adapters that
    the user loaded keep working: alone for the reference, and together with this one for the
    anchor.

    Args:
        pipe: the pipeline.
        anchor: the LoRA anchor.
        number: of the anchor, for the adapter's name.
        denoiser: the attribute of the pipeline that holds the network.

    Attributes:
        denoiser: the network.
        name: of the adapter in peft.
        layers: peft's layers that hold the adapter, by their path in the network.
        is_active: whether it acts now.

    Raises:
        ValueError: for a LoRA that does not fit the network, which is then unchanged.
    """

    def __init__(self, pipe: Any, anchor: Anchor, number: int, denoiser: str) -> None:
        prefix = denoiser
        self.denoiser: Any = unwrapped(getattr(pipe, denoiser))
        self.name = f"{PREFIX}{number}"
        self._label = f"the LoRA anchor {anchor.source}"
        self.layers: dict[str, Any] = {}
        # The modules that the layers are in, by path.
        self._parents: dict[str, nn.Module] = {}
        # (parent, name in it, layer) of each layer that `detached` has taken off the network.
        self._detached: list[tuple[nn.Module, str, Any]] = []
        self.is_active = False

        weights = anchor.lora(pipe, denoiser)
        pipeline = f"the {pipeline_label(pipe)} pipeline"
        _check_fits(self.denoiser, prefix, weights, self._label, pipeline)

        # peft freezes what it wraps, and makes the new adapter the active one: both are undone.
        requires_grad = [(p, p.requires_grad) for p in self.denoiser.parameters()]
        active = []
        for layer in lora_layers(self.denoiser).values():
            active.append((layer, layer.active_adapters[:]))
        try:
            self._load(pipe, weights, prefix)
        except Exception as error:
            self._collect_layers()
            self.remove()
            raise ValueError(
                f"{self._label} does not load onto {pipeline}: {_first_line(error)}"
            ) from error
        finally:
            # The stock pipeline's network with a LoRA on it wants no gradients of these.
            self._frozen = [p for p, required in requires_grad if required and not p.requires_grad]
            for parameter, required in requires_grad:
                parameter.requires_grad_(required)
            for layer, names in active:
                layer._active_adapter = names
        self._collect_layers()
        for layer in self.layers.values():
            layer.lora_dropout[self.name].eval()
        self._restore_precision(weights, prefix)
        self.follow()

    def _restore_precision(self, weights: LoraWeights, prefix: str) -> None:
        """Keep the adapter in the precision that the network computes in.

        peft casts it to that of the layer, which may be stored in float8 and cast when it runs.
        """
        for path, layer in self.layers.items():
            for part, module in (("A", layer.lora_A[self.name]), ("B", layer.lora_B[self.name])):
                if module.weight.dtype.itemsize > 1:
                    continue
                own = weights.state[f"{prefix}.{path}.lora_{part}.weight"]
                module.weight.data = own.to(module.weight.device, self.denoiser.dtype)

    def _collect_layers(self) -> None:
        """Note the layers of the network that hold this adapter, and what these are in."""
        for path, layer in lora_layers(self.denoiser).items():
            if self.name in getattr(layer, "scaling", {}):
                self.layers[path] = layer
                parent = path.rpartition(".")[0]
                self._parents[parent] = self.denoiser.get_submodule(parent)

    def _load(self, pipe: Any, weights: LoraWeights, prefix: str) -> None:
        """Load the weights in the way of the pipelines' own `load_lora_weights`.

        So the network at lam = 1 is that of the stock pipeline, bit for bit.
        """
        # What the user prepared for LoRAs of theirs is used up by the first one that is loaded.
        prepared = vars(self.denoiser).get(HOTSWAP)
        if prepared is not None:
            setattr(self.denoiser, HOTSWAP, None)
        try:
            with LOADING, warnings.catch_warnings():
                # Several LoRAs on one network are meant.
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                self.denoiser.load_lora_adapter(
                    dict(weights.state),
                    prefix=prefix,
                    adapter_name=self.name,
                    metadata=weights.metadata,
                    low_cpu_mem_usage=True,
                    _pipeline=pipe,
                )
        finally:
            if prepared is not None:
                setattr(self.denoiser, HOTSWAP, prepared)

    def follow(self) -> None:
        """Check that the adapter is still where it was attached, and switch it off.

        Whoever deletes an adapter of their own switches on what else the layer holds.

        Raises:
            ValueError: where somebody has removed it, fused it into the weights, or fused the
                projections that it acts on.
        """
        detached = {id(layer) for _, _, layer in self._detached}
        for path, layer in self.layers.items():
            is_attached = id(layer) in detached or self._module_at(path) is layer
            if self.name in layer.active_adapters and not self.is_active:
                layer._active_adapter = [n for n in layer.active_adapters if n != self.name]
            if not is_attached or self.name not in layer.scaling:
                raise ValueError(
                    f"{self._label} was removed from the network while the "
                    "pipeline is realigned: unload or delete LoRAs before or after the context"
                )
            if layer.merged:
                raise ValueError(
                    "a LoRA was fused into the network while the pipeline is realigned: call "
                    "pipe.unfuse_lora(), and fuse before or after the context"
                )
        _check_projections(self._parents, self.layers, self._label)

    def _module_at(self, path: str) -> Any:
        """The module at a path of the network; None where there is none any more."""
        try:
            return self.denoiser.get_submodule(path)
        except AttributeError:
            return None

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Keep the adapter off the network, except while it is active.

        What is saved, compiled or evaluated otherwise is then the reference alone. Layers that also
        hold an adapter of the user's stay wrapped.
        """
        for path, layer in self.layers.items():
            if all(name.startswith(PREFIX) for name in layer.scaling):
                parent, _, child = path.rpartition(".")
                self._detached.append((self.denoiser.get_submodule(parent), child, layer))
        for parent_module, child, layer in self._detached:
            parent_module._modules[child] = layer.base_layer
        hook = self.denoiser.register_state_dict_post_hook(drop_anchor_weights)
        try:
            yield
        finally:
            hook.remove()
            for parent_module, child, layer in self._detached:
                # Otherwise somebody has wrapped the layer anew.
                if parent_module._modules[child] is layer.base_layer:
                    parent_module._modules[child] = layer

    @contextmanager
    def active(self, scale: float | Tensor = 1.0) -> Iterator[None]:
        """Switch the adapter on.

        Args:
            scale: multiplies the adapter's own scale: a number, or one for each row of the batch
                (rows,).

        Raises:
            ValueError: where a LoRA was loaded onto a layer of the adapter in the meantime.
        """
        self._match_base_layers()
        layers = list(self.layers.values())
        states = [_LayerState(layer, self.name) for layer in layers]
        modules = self._attach()

        # peft's public switches would also change requires_grad, of the user's adapters too, at
        # every step. So the layers' attributes are set directly.
        for layer in layers:
            users = [] if layer.disable_adapters else layer.active_adapters
            _set(layer, _active_adapter=[*users, self.name], _disable_adapters=False)
        for parameter in self._frozen:
            parameter.requires_grad = False
        self.is_active = True
        try:
            with ExitStack() as stack:
                if isinstance(scale, Tensor):
                    stack.enter_context(self._scaled_by_row(scale))
                elif scale != 1:
                    for layer in layers:
                        layer.scaling[self.name] *= scale
                yield
        finally:
            self.is_active = False
            for parameter in self._frozen:
                parameter.requires_grad = True
            for state in states:
                state.restore()
            for parent, child, module in modules:
                parent._modules[child] = module

    def _attach(self) -> list[tuple[nn.Module, str, Any]]:
        """Put the layers back that were taken off.

        Returns:
            (parent, name in it, module) of what was there in their place.
        """
        modules = [(parent, child, parent._modules[child]) for parent, child, _ in self._detached]
        for (parent, child, layer), (_, _, current) in zip(self._detached, modules):
            if current is not layer and current is not layer.base_layer:
                raise ValueError(
                    "a LoRA was loaded while the pipeline is realigned: load it before, so that it "
                    "acts in reference and anchor"
                )
            parent._modules[child] = layer
        return modules

    def _match_base_layers(self) -> None:
        """Move the adapter to the device and precision of the layers that it acts on."""
        for layer in self.layers.values():
            base = layer.get_base_layer().weight
            ours = layer.lora_A[self.name].weight
            # Weights that are stored in float8 are cast when their layer runs.
            dtype = ours.dtype if base.dtype.itemsize == 1 else base.dtype
            is_offloaded = base.device.type == "meta"
            if is_offloaded or (base.device, dtype) == (ours.device, ours.dtype):
                return  # All layers are alike.
            layer.lora_A[self.name].to(base.device, dtype)
            layer.lora_B[self.name].to(base.device, dtype)

    @contextmanager
    def _scaled_by_row(self, scales: Tensor) -> Iterator[None]:
        """Multiply each layer's scale by a column (rows, 1, ...).

        peft multiplies the adapter's output by the scale, which may be a tensor. A call may change
        the scale, too: the number is read when the layer runs, and put back afterwards.
        """

        def set_column(layer: Any, inputs: tuple[Any, ...], numbers: dict[str, float]) -> None:
            numbers["scale"] = layer.scaling[self.name]
            # A layer may see the rows in parts, such as the frames of each.
            parts = max(len(inputs[0]) // len(scales), 1)
            column = numbers["scale"] * scales.repeat_interleave(parts).to(inputs[0].dtype)
            layer.scaling[self.name] = column.view(-1, *[1] * (inputs[0].ndim - 1))

        def set_number(layer: Any, *_: Any, numbers: dict[str, float]) -> None:
            layer.scaling[self.name] = numbers["scale"]

        with ExitStack() as stack:
            for layer in self.layers.values():
                numbers: dict[str, float] = {}
                before = layer.register_forward_pre_hook(partial(set_column, numbers=numbers))
                after = layer.register_forward_hook(partial(set_number, numbers=numbers))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    @property
    def is_variant(self) -> bool:
        """Whether this is a DoRA or another LoRA that does more than add one matrix to a weight."""
        return any(self.name in layer.lora_variant for layer in self.layers.values())

    @property
    def is_sum(self) -> bool:
        """Whether it adds one matrix to each weight, and nothing else."""
        has_biases = any(layer.lora_bias.get(self.name) for layer in self.layers.values())
        return not has_biases and not self.is_variant

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """What the adapter adds to each layer's weight.

        Yields:
            The weight's name in the network without a LoRA, and alpha / rank B A in its shape.
        """
        self._match_base_layers()
        for path, layer in self.layers.items():
            yield f"{path}.weight", layer.get_delta_weight(self.name)

    def check_batchable(self) -> None:
        """Check that the rows of one batch can differ in this adapter.

        Raises:
            ValueError: where they cannot.
        """
        if self.is_variant:
            raise ValueError(
                "batched=True needs a plain LoRA, and this one is a DoRA or another variant: "
                "remove batched=True"
            )
        if any(module._compiled_call_impl is not None for module in self.denoiser.modules()):
            raise ValueError(
                "batched=True and torch.compile do not go together: compiled blocks would not see "
                "which row belongs to which model; remove one of the two"
            )

    def output(self, call: Callable[[], Any]) -> Any:
        """The anchor's output, from the reference's own forward."""
        with self.active():
            return call()

    def remove(self) -> None:
        """Remove the adapter, and unwrap the layers that hold no other one."""
        for path, layer in self.layers.items():
            # Somebody may have wrapped the layer anew.
            if self._module_at(path) is not layer:
                continue
            if list(layer.scaling) == [self.name]:
                self.denoiser.set_submodule(path, layer.base_layer)
            else:
                layer.delete_adapter(self.name)
        configs = getattr(self.denoiser, "peft_config", None)
        if configs is None:
            return
        configs.pop(self.name, None)
        if not configs:
            del self.denoiser.peft_config
            # The class says False.
            vars(self.denoiser).pop("_hf_peft_config_loaded", None)


class _LayerState:
    """The attributes of a layer that `Adapter.active` changes."""

    def __init__(self, layer: Any, name: str) -> None:
        self.layer = layer
        self.name = name
        self.active = layer._active_adapter
        self.disabled = layer._disable_adapters
        self.scale = layer.scaling[name]

    def restore(self) -> None:
        _set(self.layer, _active_adapter=self.active, _disable_adapters=self.disabled)
        self.layer.scaling[self.name] = self.scale


def _set(layer: nn.Module, **attributes: Any) -> None:
    """Set plain attributes of a layer.

    nn.Module's own assignment looks for parameters and submodules of the name first: with hundreds
    of layers at each evaluation, a GPU would wait for it.
    """
    vars(layer).update(attributes)


def drop_anchor_weights(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """A hook on `state_dict`: the anchors' adapters are not part of what is saved.

    They are in the state where they share layers with adapters of the user's.
    """
    for key in list(state):
        if f".{PREFIX}" in key:
            del state[key]


def lora_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The layers of a network that peft has wrapped, by their path in it."""
    modules = denoiser.named_modules()
    return {path: module for path, module in modules if isinstance(module, BaseTunerLayer)}


def check_unfused(layers: Mapping[str, Any]) -> None:
    """Check that no LoRA is fused into a network's weights.

    Args:
        layers: peft's layers in it, by path.

    Raises:
        ValueError: where there is one, which an anchor would then lack.
    """
    if any(layer.merged for layer in layers.values()):
        raise ValueError(
            "the pipeline has LoRA weights fused into it, which would hide the anchor's: call "
            "pipe.unfuse_lora() first"
        )


def _check_projections(modules: Mapping[str, nn.Module], paths: Iterable[str], anchor: str) -> None:
    """Raise ValueError where attention does not use the layers that a LoRA changes.

    Args:
        modules: of the network, by path.
        paths: of the layers.
        anchor: how an error names the LoRA.
    """
    for path in paths:
        parent, _, layer = path.rpartition(".")
        is_fused = getattr(modules.get(parent), "fused_projections", False)
        if is_fused and layer in FUSED_PARTS:
            raise ValueError(
                f"{anchor} changes {path}, which the pipeline's fused projections do not use: call "
                "pipe.unfuse_qkv_projections() first"
            )


def _layer_paths(weights: LoraWeights, prefix: str) -> list[str]:
    """The paths of the layers that a LoRA changes, whose names in it begin with a prefix."""
    return [key.removeprefix(f"{prefix}.").partition(".lora_")[0] for key in weights.state]


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without its end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")


def _check_fits(
    denoiser: nn.Module, prefix: str, weights: LoraWeights, anchor: str, pipeline: str
) -> None:
    """Raise ValueError where a LoRA's layers are not those of the network.

    Args:
        denoiser: the network.
        prefix: of the layers' names in `weights`.
        weights: the LoRA.
        anchor: how an error names the LoRA.
        pipeline: how an error names the pipeline.
    """
    check_unfused(lora_layers(denoiser))
    modules = dict(denoiser.named_modules())
    _check_projections(modules, _layer_paths(weights, prefix), anchor)
    for key, matrix in weights.state.items():
        path, _, part = key.removeprefix(f"{prefix}.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        if path not in modules:
            raise ValueError(
                f"{anchor} does not bind to {pipeline}, which has no layer {path}: give an anchor "
                "of its family"
            )
        # A reads the layer's input, the weight's second axis; B writes its output, the first.
        weight = modules[path].weight
        lora_size, layer_size = matrix.shape[0], weight.shape[0]
        if part == "A.weight":
            lora_size, layer_size = matrix.shape[1], weight.shape[1]
        if lora_size != layer_size:
            raise ValueError(
                f"{anchor} does not fit {pipeline}: its layer {path} is for size {lora_size}, the "
                f"pipeline's is {layer_size}"
            )
