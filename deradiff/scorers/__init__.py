"""Scorers: what a picture is worth for its prompt. One protocol, `(images, prompts) -> scores`, whatever is behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deradiff.scorers.recipes import AESTHETIC_HEAD, AESTHETIC_TOWER, RECIPES, REWARDS
from deradiff.scorers.spec import ScorerSpec

if TYPE_CHECKING:
    from deradiff.scorers.base import Scorer

SETTINGS: dict[str, tuple[str, ...]] = {  # by scorer: what of it can be set
    **dict.fromkeys(RECIPES, ("checkpoint", "tokenizer", "model_config")),
    "aesthetic": ("checkpoint", "tokenizer", "model_config", "head"),
    "imagereward": ("checkpoint", "tokenizer"),
    **dict.fromkeys(REWARDS, ()),
}
SCORERS = tuple(SETTINGS)

__all__ = ["SCORERS", "check_scorer", "load_scorer"]


def _check_settings(name: str, file: str | None, **settings: str | None) -> None:
    given = [key for key, value in settings.items() if value is not None]
    if file is not None:
        if name in SCORERS:
            raise ValueError(
                f"{name} is a scorer of deradiff's: give the one in {file} a name of its own, such as scorers.mine.file={file}"
            )
        if given:
            raise ValueError(
                f"the scorer in {file} loads its weights itself: leave out {' and '.join(given)}"
            )
        return
    if name not in SCORERS:
        raise ValueError(
            f"there is no scorer {name!r}; the scorers are {', '.join(SCORERS)}, and mine with scorers.mine.file=<yours>.py"
        )
    if strange := [key for key in given if key not in SETTINGS[name]]:
        what = (
            "is a formula, not a network" if name in REWARDS else f"has no {' or '.join(strange)}"
        )
        raise ValueError(f"the scorer {name} {what}: leave out {' and '.join(strange)}")


def check_scorer(
    name: str,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    model_config: str | None = None,
    head: str | None = None,
    file: str | None = None,
) -> None:
    """Raise the ValueError that `load_scorer` would raise, without reading a weight (of files on disk: names and shapes alone).

    A hub id is asked for its configuration and tokenizer only, so that it costs a second; its weights come with `load_scorer`. A file of
    the user's own is read and not run.
    """
    _check_settings(
        name, file, checkpoint=checkpoint, tokenizer=tokenizer, model_config=model_config, head=head
    )
    if file is not None:
        from deradiff.scorers.user_file import check_own

        check_own(file)
    elif name in RECIPES:
        from deradiff.scorers.checkpoints import find

        find(RECIPES[name], checkpoint, tokenizer, model_config)
    elif name == "aesthetic":
        from deradiff.scorers.aesthetic import read_head
        from deradiff.scorers.checkpoints import find, place

        tower, where = (
            find(AESTHETIC_TOWER, checkpoint, tokenizer, model_config),
            place(head or AESTHETIC_HEAD),
        )
        if where.repo is None:
            read_head(where, tower.config.projection_dim, "meta")
    elif name == "imagereward":
        from deradiff.scorers.imagereward import find as find_imagereward

        find_imagereward(checkpoint, tokenizer)


def load_scorer(
    name: str,
    checkpoint: str | None = None,
    tokenizer: str | None = None,
    model_config: str | None = None,
    head: str | None = None,
    file: str | None = None,
    device: str = "cpu",
) -> Scorer:
    """A scorer by its name in `SCORERS`: `scorer(images, prompts)` is a float32 tensor (N,) on the CPU, without gradient.

    checkpoint: hub id (`org/name`, or `org/name/file.pt`) or path; a folder is a Hugging Face CLIPModel, a `.pt`, `.pth`, `.bin` or
        `.safetensors` file an open_clip state dict (of `imagereward`: ImageReward's). Default: the published weights (recipes.py).
    tokenizer: hub id or folder of a CLIP tokenizer (of `imagereward`: BERT's). Default: the checkpoint folder's own where it has one, else
        the published one.
    model_config: an open_clip model config (json file) for a state dict whose sizes are not ViT-H-14's.
    head: of `aesthetic`, the linear chain's file. Default: the published one.
    file: a Python file of the user's own with one scorer class in it (own.py); `name` is then any name of its own.

    Raises ValueError, before any weight is loaded, for an unknown name, a missing checkpoint, and weights of another layout or size.
    """
    _check_settings(
        name, file, checkpoint=checkpoint, tokenizer=tokenizer, model_config=model_config, head=head
    )
    if file is not None:
        from deradiff.scorers.user_file import OwnScorer

        return OwnScorer(name, file, device)
    if name in REWARDS:
        from deradiff.worlds.rewards import Reward

        return Reward(name)
    if name == "imagereward":
        from deradiff.scorers.imagereward import ImageRewardScorer
        from deradiff.scorers.imagereward import find as find_imagereward

        return ImageRewardScorer(find_imagereward(checkpoint, tokenizer), device)
    from deradiff.scorers.checkpoints import find, place

    if name == "aesthetic":
        from deradiff.scorers.aesthetic import AestheticScorer

        return AestheticScorer(
            find(AESTHETIC_TOWER, checkpoint, tokenizer, model_config),
            place(head or AESTHETIC_HEAD),
            device,
        )
    from deradiff.scorers.clip import CLIPScorer

    return CLIPScorer(
        RECIPES[name], find(RECIPES[name], checkpoint, tokenizer, model_config), device
    )


def check_spec(spec: ScorerSpec) -> None:
    """`check_scorer` for a spec."""
    check_scorer(
        spec.name, spec.checkpoint, spec.tokenizer, spec.model_config, spec.head, spec.file
    )


def load_spec(spec: ScorerSpec, device: str = "cpu") -> Scorer:
    """`load_scorer` for a spec."""
    return load_scorer(
        spec.name, spec.checkpoint, spec.tokenizer, spec.model_config, spec.head, spec.file, device
    )
