"""A network's passes as CUDA graphs, so that the host does not call each of their operators.

At a small batch a GPU computes an operator sooner than the host calls the next one. A CUDA graph is
a list of operators with the memory that they read and write, recorded once. To replay it the host
calls one function, and what is computed is the same, bit for bit.

A recording holds for the shapes and the addresses that it was made with. So it is looked up by all
that a pass depends on: the arguments that are no tensors, the shapes of those that are, the
addresses of the weights, and the settings of the modules. Whatever differs is recorded anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

PLAIN_VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""Types of arguments and settings that are compared by their value."""

MODULES_OWN = vars(nn.Module()).keys() - {"training"}
"""Attributes that torch keeps on every module, which are no settings."""

MOST_RECORDINGS = 12
"""Recordings of one network; the oldest one goes first."""

MOST_SEEN = 256
"""Passes that are remembered as seen once."""

WARM_UPS = 3
"""Passes before a training pass is recorded, as torch recommends."""

Forward = Callable[..., Any]


class NotRecordedWarning(UserWarning):
    """A network's passes cannot be recorded. It is given once for each network."""


@dataclass(frozen=True)
class Recording:
    """A recorded pass.

    Attributes:
        inputs: the arguments that it reads; numbers and words among them are what they were.
        outputs: the tensors that it writes, and whatever else the network returned.
        structure: how the outputs make up what the network returns.
        replay: computes the outputs from the inputs.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    structure: TreeSpec
    replay: Callable[[], None]

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """What the network returns for these arguments, in tensors of its own.

        Args:
            leaves: the arguments, in the order of `inputs`.
        """
        for own, leaf in zip(self.inputs, leaves):
            if isinstance(own, Tensor):
                own.copy_(leaf)
        self.replay()
        outputs = [out.clone() if isinstance(out, Tensor) else out for out in self.outputs]
        return tree_unflatten(outputs, self.structure)


class Recordings:
    """The passes of a network without gradients.

    A pass runs as it is the first time, which sets up whatever the libraries set up once. It is
    recorded the second time, and replayed from then on.

    Args:
        network: the network. Its modules are looked at when `refresh` is called.
        own_hook: the name of the hook of diffusers on it that calls `run`.
    """

    def __init__(self, network: nn.Module, own_hook: str = "") -> None:
        self.network = network
        self.own_hook = own_hook
        self._recordings: dict[Hashable, Recording] = {}
        self._seen: set[Hashable] = set()
        self._pool: Any = None
        self._weights: list[tuple[dict[str, Any], str]] = []
        self._settings: list[Settings] = []
        self._processors: list[tuple[Any, Any]] = []
        self._is_possible = True
        self.refresh()

    def refresh(self) -> None:
        """Look at the network's modules anew: some may have been added, or have got hooks."""
        self._weights = []
        self._settings = []
        self._processors = []
        self._is_possible = True
        for module in self.network.modules():
            # The layers of torch have settings, too, but nobody changes them.
            is_torchs = type(module).__module__.startswith("torch.nn")
            if not is_torchs or module is self.network:
                self._settings.append(Settings(vars(module)))
            processor = getattr(module, "processor", None)
            if processor is not None:
                self._settings.append(Settings(vars(processor)))
                self._processors.append((module, processor))
            for container in (module._parameters, module._buffers):
                for key, weight in container.items():
                    if weight is not None:
                        self._weights.append((container, key))
            if has_hooks(module, self.own_hook):
                self._is_possible = False

    def run(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """A pass of the network.

        Args:
            forward: evaluates the network.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            What `forward` returns.
        """
        leaves, structure = tree_flatten((args, kwargs))
        if any(module.processor is not own for module, own in self._processors):
            self.refresh()
        if not self._is_possible or not is_recordable(leaves):
            return forward(*args, **kwargs)
        key = self._key(leaves, structure)
        recording = self._recordings.get(key)
        if recording is None and key not in self._seen:
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen.add(key)
            return forward(*args, **kwargs)
        if recording is None:
            try:
                recording = self._record(forward, leaves, structure)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._give_up(error)
                return forward(*args, **kwargs)
            self._keep(key, recording)
        return recording(leaves)

    def _key(self, leaves: Sequence[Any], structure: TreeSpec) -> Hashable:
        """All that a recording depends on."""
        addresses = tuple(container[key].data_ptr() for container, key in self._weights)
        settings = tuple(settings.now() for settings in self._settings)
        return (structure, shapes_of(leaves), addresses, settings)

    def _record(self, forward: Forward, leaves: Sequence[Any], structure: TreeSpec) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return record(forward, leaves, structure, self._pool)

    def _keep(self, key: Hashable, recording: Recording) -> None:
        if len(self._recordings) >= MOST_RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))
        self._recordings[key] = recording

    def _give_up(self, error: RuntimeError) -> None:
        """Say once why this network is not recorded, and let it run as it is."""
        self._is_possible = False
        self._recordings.clear()
        warn_not_recorded(self.network, error)


def record(forward: Forward, leaves: Sequence[Any], structure: TreeSpec, pool: Any) -> Recording:
    """Record a pass as a CUDA graph.

    Args:
        forward: evaluates the network.
        leaves: its arguments.
        structure: how these make up positional and keyword arguments.
        pool: the memory that recordings share, which are never replayed at once.

    Raises:
        RuntimeError: where the pass waits for the device, which a graph cannot.
    """
    inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(inputs, structure)
    graph = torch.cuda.CUDAGraph()
    with without_autocast_cache(), recorded_in(graph, pool):
        output = forward(*args, **kwargs)
    outputs, output_structure = tree_flatten(output)
    return Recording(inputs, outputs, output_structure, graph.replay)


def recorded_in(graph: Any, pool: Any) -> Any:
    """The context in which operators are recorded; other threads may use the device meanwhile."""
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Autocast as it is, without the copies of weights that it keeps from operator to operator.

    They would lie in the memory of the recording that made them.
    """
    if not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
        yield


def is_recordable(leaves: Sequence[Any]) -> bool:
    """Whether a pass without gradients depends on nothing but tensors on a GPU and plain values."""
    if torch.is_grad_enabled():
        return False
    return all(is_plain_tensor(leaf) or type(leaf) in PLAIN_VALUES for leaf in leaves)


def is_plain_tensor(value: Any) -> bool:
    """Whether a value is a tensor on a GPU, and of no subclass."""
    return type(value) in (Tensor, nn.Parameter) and value.device.type == "cuda"


def shapes_of(leaves: Sequence[Any]) -> Hashable:
    """The arguments of a pass as far as a recording of it depends on them."""
    found: list[Hashable] = [torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.append((tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device))
        else:
            # 1 and 1.0 and True are equal, and not the same.
            found.append((type(leaf), leaf))
    return tuple(found)


class Settings:
    """The plain values among attributes, also those in lists and dictionaries.

    Which attributes these are is looked at once: the values are read before every pass.

    Args:
        attributes: of a module, or of its attention processor.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._plain: list[str] = []
        self._lists: list[str] = []
        self._dicts: list[str] = []
        for name, value in attributes.items():
            if name in MODULES_OWN:
                continue
            if type(value) in PLAIN_VALUES:
                self._plain.append(name)
            elif type(value) in (list, tuple):
                self._lists.append(name)
            elif type(value) is dict:
                self._dicts.append(name)

    def now(self) -> Hashable:
        """The values, and how many attributes there are."""
        attributes = self._attributes
        found: list[Hashable] = [len(attributes)]
        found += [attributes.get(name) for name in self._plain]
        for name in self._lists:
            found.append(_plain(attributes.get(name) or ()))
        for name in self._dicts:
            items = attributes.get(name) or {}
            found.append((tuple(items), _plain(items.values())))
        return tuple(found)


def _plain(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """The plain values among others."""
    return tuple(value for value in values if type(value) in PLAIN_VALUES)


def has_hooks(module: nn.Module, own_hook: str = "") -> bool:
    """Whether somebody's code runs with a module: offloading, a cache, a hook of torch's.

    Args:
        module: of a network.
        own_hook: the name of a hook of diffusers that does not count.
    """
    registry: Any = getattr(module, "_diffusers_hook", None)
    if registry is not None and set(registry.hooks) - {own_hook}:
        return True
    has_torch_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    return has_torch_hooks or hasattr(module, "_hf_hook")


def warn_not_recorded(network: nn.Module, error: RuntimeError) -> None:
    """Say that a network runs without CUDA graphs, and why."""
    reason = str(error).strip().partition("\n")[0]
    warnings.warn(
        f"the passes of {type(network).__name__} cannot be recorded as CUDA graphs ({reason}), so "
        "the host calls each operator",
        NotRecordedWarning,
        stacklevel=2,
    )


# Training


class RecordedTraining:
    """A network whose passes in training are recorded, forward and backward.

    Within `active` the network's forward replays recordings: with gradients by
    `torch.cuda.make_graphed_callables`, and without gradients, as a LoRA's reference, by
    `Recordings`. Outside it the network is as it was.

    The gradients of the trained weights have to stay where they are (`zero_grad(set_to_none=
    False)`): autograd may take the recording's own tensors for them, which the next pass
    overwrites.

    Args:
        network: in training mode on a GPU, and not wrapped yet.

    Raises:
        ValueError: for a network that draws random numbers, which are not recorded.
    """

    def __init__(self, network: nn.Module) -> None:
        check_without_dropout(network)
        # torch warms up on a stream of its own before it records, and would warn of that later.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self.network = network
        self.forward: Forward = network.forward
        self._is_active = False
        self._passes: dict[Hashable, Forward] = {}
        self._pool: Any = None
        self._is_possible = True
        self._without_gradients = Recordings(network)

        # A function, not a method: accelerate would bind a method to the network.
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._pass(*args, **kwargs)

        network.forward = forward  # type: ignore[method-assign]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replay recordings within the block."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False

    def release(self) -> None:
        """Give the memory of the recordings back; the network is as it was."""
        self._is_possible = False
        self._passes.clear()
        self._without_gradients = Recordings(self.network)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        """What the network's own forward returns."""
        if not self._is_active or not self._is_possible:
            return self.forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._without_gradients.run(self.forward, *args, **kwargs)

        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(is_plain_tensor(tensor) for tensor in tensors):
            return self.forward(*args, **kwargs)
        key = (structure, shapes_of(leaves))
        recorded = self._passes.get(key)
        if recorded is None:
            try:
                recorded = self._record(leaves, structure)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._is_possible = False
                warn_not_recorded(self.network, error)
                return self.forward(*args, **kwargs)
            self._passes[key] = recorded
        return recorded(*tensors)

    def _record(self, leaves: Sequence[Any], structure: TreeSpec) -> Forward:
        """Record forward and backward of a pass."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        samples = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]
        by_position = _ByPosition(self.network, self.forward, leaves, structure)
        with without_autocast_cache():
            recorded = torch.cuda.make_graphed_callables(
                by_position,
                tuple(samples),
                num_warmup_iters=WARM_UPS,
                allow_unused_input=True,
                pool=self._pool,
            )
        for parameter in self.network.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return recorded


class _ByPosition(nn.Module):
    """A network as torch records it: a module that takes nothing but tensors.

    Args:
        network: its weights are this module's.
        forward: evaluates it.
        leaves: the arguments of a pass; those that are no tensors are the same in each.
        structure: how they make up positional and keyword arguments.
    """

    def __init__(
        self, network: nn.Module, forward: Forward, leaves: Sequence[Any], structure: TreeSpec
    ) -> None:
        super().__init__()
        self.network = network
        self._forward = forward
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._structure = structure

    def forward(self, *tensors: Tensor) -> Any:
        """The network's output."""
        given = iter(tensors)
        leaves = []
        for leaf, is_tensor in zip(self._leaves, self._is_tensor):
            leaves.append(next(given) if is_tensor else leaf)
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self._forward(*args, **kwargs)


def check_without_dropout(network: nn.Module) -> None:
    """Raise ValueError for a network that drops out values in training."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"{name} drops out a share of {module.p:g} of its values, which is not recorded as "
                "a CUDA graph: remove compile, or the dropout"
            )


def enable_gradient_checkpointing(network: Any) -> None:
    """Have a network of diffusers compute its blocks' inner values again in the backward pass.

    The random numbers of a block are kept for the second time only where it draws some: a pass that
    is recorded may not ask the device where its generator is.

    Args:
        network: a network of diffusers.
    """
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())

    def compute_again(block: nn.Module, *args: Any) -> Any:
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=draws)

    network.enable_gradient_checkpointing(compute_again)
