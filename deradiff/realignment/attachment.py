"""Which networks of a pipeline are realigned, and the anchors on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from deradiff.anchors.anchor import Anchor
from deradiff.anchors.live import LiveAdapter
from deradiff.models.family import unwrapped
from deradiff.models.pipelines import denoiser_name, denoiser_names, pipeline_label
from deradiff.realignment.adapters import Adapter, check_unfused, lora_layers
from deradiff.realignment.full_anchor import FullAnchor

HOOK = "deradiff_realign"
"""The name of our hook in diffusers' registry of a network's hooks."""

PRIOR_CLASS = "PriorTransformer"
"""diffusers' network whose pipelines read its weights outside of its forward."""

UNCONDITIONAL = "unconditional_transformer"
"""The attribute of a network for the unconditional branch of guidance alone."""

SHARED_CHAIN = ("transformer_2", UNCONDITIONAL)
"""The attributes of networks that share the chain of steps with the first."""


def realigned_denoisers(pipe: Any) -> list[str]:
    """The attributes of a pipeline whose networks are realigned.

    Two that share one chain of steps, as those of Wan 2.2 for early and late steps, are realigned
    both. Of a network for the unconditional branch alone there is no anchor.

    Raises:
        ValueError: where the pipeline's networks cannot be realigned together.
    """
    first = denoiser_name(pipe)
    if type(unwrapped(getattr(pipe, first))).__name__ == PRIOR_CLASS:
        raise ValueError(
            f"{type(pipe).__name__} uses weights of its {first} outside of the network's forward, "
            "where an anchor's cannot take their place: realign the pipeline that decodes"
        )
    names = denoiser_names(pipe)
    if any(name not in (first, *SHARED_CHAIN) for name in names):
        raise ValueError(
            f"{type(pipe).__name__} runs several models one after the other ({', '.join(names)}): "
            "realign the pipeline of one of them"
        )
    return [name for name in names if name != UNCONDITIONAL]


def check_not_realigned(pipe: Any, names: Sequence[str]) -> None:
    """Raise ValueError where one of a pipeline's networks is realigned at the moment.

    Args:
        pipe: the pipeline.
        names: of its denoisers.
    """
    for name in names:
        registry = getattr(getattr(pipe, name), "_diffusers_hook", None)
        if registry and HOOK in registry.hooks:
            raise ValueError(
                "this pipeline is being realigned already: leave that context or close its dial "
                "first, or give several anchors to one"
            )


def check_parts(pipe: Any, names: Sequence[str], anchors: Sequence[Anchor]) -> None:
    """Raise ValueError for a LoRA file where a pipeline has a second denoiser.

    Stock pipelines load a file into one of the two, as they are told.

    Args:
        pipe: the pipeline.
        names: of its denoisers.
        anchors: the anchors.
    """
    for anchor in anchors:
        if len(names) > 1 and anchor.method == "lora" and not isinstance(anchor, LiveAdapter):
            raise ValueError(
                f"the LoRA anchor {anchor.source} is for one denoiser, and {type(pipe).__name__} "
                f"has {' and '.join(names)}: load a LoRA into each under one adapter_name (with "
                "load_into_transformer_2=True into the second), and give "
                "deradiff.adapter_anchor(pipe, name)"
            )


def attach_all(
    pipe: Any, name: str, anchors: Sequence[Anchor], stack: ExitStack, *, on_cpu: bool = False
) -> list[Adapter | FullAnchor]:
    """Load the anchors' weights for one denoiser.

    LoRAs are attached to the reference's network, and full anchors are weights for it.

    Args:
        pipe: the pipeline.
        name: of the denoiser.
        anchors: the anchors.
        stack: undoes it.
        on_cpu: keep the weights of full anchors on the CPU; see `FullAnchor`.
    """
    network = unwrapped(getattr(pipe, name))
    check_unfused(lora_layers(network))
    is_first = name == denoiser_name(pipe)
    has_others = len(realigned_denoisers(pipe)) > 1
    attached: list[Adapter | FullAnchor] = []
    for number, anchor in enumerate(anchors):
        if anchor.method == "full":
            own = anchor.part(name) if has_others or not is_first else anchor
            attached.append(FullAnchor(network, own, pipeline_label(pipe), on_cpu=on_cpu))
            continue
        adapter = Adapter(pipe, anchor, number, name)
        stack.callback(adapter.remove)
        attached.append(adapter)
    for network_anchor in attached:
        if isinstance(network_anchor, Adapter):
            stack.enter_context(network_anchor.detached())
    return attached
