"""Scorers: what an image is worth for its prompt.

One protocol, `scorer(images, prompts) -> scores`, whatever is behind it. A mistake in a scorer's
name or files is found before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from deradiff.scorers.registry import SCORERS, entry_of, module_of
from deradiff.scorers.spec import Endpoint, PairwiseSpec, ScorerSpec

if TYPE_CHECKING:  # it imports torch
    from deradiff.scorers.base import Scorer

__all__ = [
    "SCORERS",
    "Endpoint",
    "PairwiseSpec",
    "ScorerSpec",
    "check_prompts",
    "check_scorer",
    "check_spec",
    "entry_of",
    "load_scorer",
    "load_spec",
]


def check_spec(spec: ScorerSpec) -> None:
    """Raise the ValueError that `load_spec` would raise, without reading a weight.

    Of files on disk only names and shapes are read. A hub id is asked for its configuration and
    tokenizer, which costs a second; its weights come with `load_spec`. A user's file is read and
    not run.
    """
    module_of(entry_of(spec)).check(spec)


def check_prompts(spec: ScorerSpec, prompts: Iterable[str]) -> None:
    """Refuse prompts for which a scorer has no score, before an image is read.

    Args:
        spec: which scorer.
        prompts: to judge by.

    Raises:
        ValueError: with the first of them.
    """
    entry = entry_of(spec)
    if entry.reads_scene:
        module_of(entry).check_prompts(spec, prompts)


def load_spec(spec: ScorerSpec, device: str = "cpu") -> Scorer:
    """The scorer of a spec.

    Args:
        spec: which scorer, and its files.
        device: of its network.

    Raises:
        ValueError: before a weight is loaded, for an unknown name, a missing checkpoint,
            and weights of another layout or size.
    """
    return module_of(entry_of(spec)).load(spec, device)


def check_scorer(
    name: str,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    model_config: str | None = None,
    head: str | None = None,
    file: str | None = None,
    endpoint: Endpoint | None = None,
    rubric: str | None = None,
) -> None:
    """`check_spec` of the same arguments as `load_scorer`."""
    spec = ScorerSpec(name, checkpoint, tokenizer, model_config, head, file, endpoint, rubric)
    check_spec(spec)


def load_scorer(
    name: str,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    model_config: str | None = None,
    head: str | None = None,
    file: str | None = None,
    device: str = "cpu",
    endpoint: Endpoint | None = None,
    rubric: str | None = None,
) -> Scorer:
    """A scorer by its name: `scorer(images, prompts)` gives a float32 tensor (N,) on the CPU.

    Args:
        name: a key of `SCORERS`; with `file`, any name of its own.
        checkpoint: a hub id (`org/name`, or `org/name/file.pt`) or a path. A folder is a Hugging
            Face CLIPModel; a `.pt`, `.pth`, `.bin` or `.safetensors` file is an open_clip state
            dict (of `imagereward`: ImageReward's). None: the published weights.
        tokenizer: a hub id or folder of a CLIP tokenizer (of `imagereward`: BERT's). None: the
            checkpoint folder's own where it has one, otherwise the published one.
        model_config: an open_clip model config (a JSON file) for a state dict whose sizes are not
            ViT-H-14's.
        head: of `aesthetic`: the file of its linear layers. None: the published one.
        file: a Python file of the user's own with one scorer class in it.
        device: of its network.
        endpoint: of `judge`: the server of a vision-language model.
        rubric: of `judge`: what the model is asked, by the name of one that ships or as a file.
            None: the default one.

    Raises:
        ValueError: before a weight is loaded, for an unknown name, a missing checkpoint,
            and weights of another layout or size.
    """
    spec = ScorerSpec(name, checkpoint, tokenizer, model_config, head, file, endpoint, rubric)
    return load_spec(spec, device)
