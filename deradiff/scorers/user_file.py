"""A scorer of the user's own: one class in one Python file.

It is run as their own code because they named it; it is never fetched from a hub.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from deradiff.scorers.base import digest
from deradiff.scorers.spec import ScorerSpec

STATED = ("scale", "preprocessing")
"""What the class must say of itself."""


def scorer_class(file: str) -> str:
    """The name of the scorer class that a file holds, read without running it.

    The class has a `__call__`, and `scale` and `preprocessing`, strings in its body.

    Raises:
        ValueError: where there is not one such class.
    """
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"there is no Python file {file}: give file= a local file that ends in .py and holds "
            "your scorer class"
        )
    try:
        tree = ast.parse(path.read_bytes(), filename=file)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no Python that can be read: {error}") from error

    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    scorers = [node for node in classes if "__call__" in _methods(node)]
    if len(scorers) != 1:
        names = ", ".join(node.name for node in scorers)
        count = f"{len(scorers)} ({names})" if scorers else "none"
        raise ValueError(
            f"{file} must hold one class with a __call__(self, images, prompts), and holds {count}"
        )
    (scorer,) = scorers
    missing = [name for name in STATED if name not in _assigned(scorer)]
    if missing:
        raise ValueError(
            f"the class {scorer.name} in {file} must state its {' and '.join(missing)}: write "
            f"{missing[0]} = '...' in its body"
        )
    return scorer.name


def _methods(node: ast.ClassDef) -> set[str]:
    return {child.name for child in node.body if isinstance(child, ast.FunctionDef)}


def _assigned(node: ast.ClassDef) -> set[str]:
    """The names that a class's body assigns."""
    targets: list[ast.expr] = []
    for child in node.body:
        if isinstance(child, ast.Assign):
            targets += child.targets
        elif isinstance(child, ast.AnnAssign) and child.value is not None:
            targets.append(child.target)
    names: set[str] = set()
    for target in targets:
        elements = target.elts if isinstance(target, ast.Tuple) else [target]
        names.update(element.id for element in elements if isinstance(element, ast.Name))
    return names


def _load_module(path: Path, version: str) -> ModuleType:
    name = f"_own_scorer_{path.stem}_{version}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class UserScorer:
    """The user's class behind the `Scorer` protocol.

    Its `__init__`, if it takes anything, takes the device (`cpu`, `cuda:0`). It is called with RGB
    images and their prompts and gives a number for each: a list, an array or a tensor. The version
    is a digest of the file, and the class's own `version` where it has one, to be changed with what
    the file does not hold, such as weights.

    Args:
        name: of the scorer.
        file: the user's.
        device: of its network.
    """

    def __init__(self, name: str, file: str, device: str = "cpu") -> None:
        class_name = scorer_class(file)
        path = Path(file)
        self.name = name
        self.version = digest([path])
        user_class = getattr(_load_module(path, self.version), class_name)
        self.scale = str(user_class.scale)
        self.preprocessing = str(user_class.preprocessing)
        if hasattr(user_class, "version"):
            self.version += f"-{user_class.version}"
        takes_device = bool(inspect.signature(user_class).parameters)
        self.scorer: Any = user_class(device) if takes_device else user_class()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,), float32 on the CPU.

        Raises:
            ValueError: where the user's class does not give one for each image.
        """
        if not images:
            return torch.empty(0)
        rgb = [image.convert("RGB") for image in images]
        scores = torch.as_tensor(self.scorer(rgb, list(prompts)))
        if scores.shape != (len(images),):
            raise ValueError(
                f"{type(self.scorer).__name__} gave scores of shape {[*scores.shape]} for "
                f"{len(images)} images, not one for each"
            )
        return scores.float().cpu()


def check(spec: ScorerSpec) -> None:
    """Raises ValueError where the file holds no scorer; it is read and not run."""
    scorer_class(str(spec.file))


def load(spec: ScorerSpec, device: str) -> UserScorer:
    """The scorer of a spec."""
    return UserScorer(spec.name, str(spec.file), device)
