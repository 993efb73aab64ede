"""Scorers: what a picture is worth for its prompt. One protocol, `(images, prompts) -> scores`, whatever is behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deradiff.scorers.recipes import RECIPES, REWARDS

if TYPE_CHECKING:
    from deradiff.scorers.base import Scorer

SCORERS = (*RECIPES, *REWARDS)

__all__ = ["SCORERS", "check_scorer", "load_scorer"]


def _check_name(name: str, **settings: str | None) -> None:
    if name not in SCORERS:
        raise ValueError(f"there is no scorer {name!r}; the scorers are {', '.join(SCORERS)}")
    given = [key for key, value in settings.items() if value is not None]
    if name in REWARDS and given:
        raise ValueError(f"the scorer {name} is a formula, not a network: leave out {' and '.join(given)}")


def check_scorer(name: str, checkpoint: str | None = None, tokenizer: str | None = None, model_config: str | None = None) -> None:
    """Raise the ValueError that `load_scorer` would raise, without reading a weight (of files on disk: names and shapes alone).

    A hub id is asked for its configuration and tokenizer only, so that it costs a second; its weights come with `load_scorer`.
    """
    _check_name(name, checkpoint=checkpoint, tokenizer=tokenizer, model_config=model_config)
    if name in RECIPES:
        from deradiff.scorers.checkpoints import find

        find(RECIPES[name], checkpoint, tokenizer, model_config)


def load_scorer(
    name: str, checkpoint: str | None = None, tokenizer: str | None = None, model_config: str | None = None, device: str = "cpu"
) -> Scorer:
    """A scorer by its name in `SCORERS`: `scorer(images, prompts)` is a float32 tensor (N,) on the CPU, without gradient.

    checkpoint: hub id (`org/name`, or `org/name/file.pt`) or path; a folder is a Hugging Face CLIPModel, a `.pt`, `.bin` or
        `.safetensors` file an open_clip state dict. Default: the published weights (recipes.py).
    tokenizer: hub id or folder of a CLIP tokenizer. Default: the checkpoint folder's own where it has one, else ViT-H-14's.
    model_config: an open_clip model config (json file) for a state dict whose sizes are not ViT-H-14's.

    Raises ValueError, before any weight is loaded, for an unknown name, a missing checkpoint, and weights of another layout or size.
    """
    _check_name(name, checkpoint=checkpoint, tokenizer=tokenizer, model_config=model_config)
    if name in REWARDS:
        from deradiff.scorers.rewards import Reward

        return Reward(name)
    from deradiff.scorers.checkpoints import find
    from deradiff.scorers.clip import CLIPScorer

    return CLIPScorer(RECIPES[name], find(RECIPES[name], checkpoint, tokenizer, model_config), device)
