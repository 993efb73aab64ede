"""A scorer of the user's own: one class in one Python file of theirs, run as their own code because they named it; never from a hub."""

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

STATED = ("scale", "preprocessing")


def check_own(file: str) -> str:
    """The name of the scorer class that a file holds, read without running it.

    The class has a `__call__`, and `scale` and `preprocessing`, strings in its body. Raises ValueError where there is not one such class.
    """
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"there is no Python file {file}: give file= a local file that ends in .py and holds your scorer class"
        )
    try:
        tree = ast.parse(path.read_bytes(), filename=file)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{file} is no Python that can be read: {error}") from error
    classes = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "__call__" in _methods(node)
    ]
    if len(classes) != 1:
        found = f"{len(classes)} ({', '.join(c.name for c in classes)})" if classes else "none"
        raise ValueError(
            f"{file} must hold one class with a __call__(self, images, prompts), and holds {found}"
        )
    missing = [name for name in STATED if name not in _assigned(classes[0])]
    if missing:
        raise ValueError(
            f"the class {classes[0].name} in {file} must state its {' and '.join(missing)}: write {missing[0]} = '...' in its body"
        )
    return classes[0].name


def _methods(node: ast.ClassDef) -> set[str]:
    return {child.name for child in node.body if isinstance(child, ast.FunctionDef)}


def _assigned(node: ast.ClassDef) -> set[str]:
    targets = [t for child in node.body if isinstance(child, ast.Assign) for t in child.targets]
    targets += [
        child.target
        for child in node.body
        if isinstance(child, ast.AnnAssign) and child.value is not None
    ]
    names = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {n.id for n in names if isinstance(n, ast.Name)}


def _module(path: Path, version: str) -> ModuleType:
    name = f"_own_scorer_{path.stem}_{version}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class OwnScorer:
    """The user's class behind the `Scorer` protocol.

    Its `__init__`, if it takes anything, takes the device (`cpu`, `cuda:0`). It is called with RGB pictures and their prompts and gives a
    number for each: a list, an array or a tensor. version: a digest of the file, and the class's own `version` where it has one, to be
    changed with what the file does not hold, such as weights.
    """

    def __init__(self, name: str, file: str, device: str = "cpu") -> None:
        own, path = check_own(file), Path(file)
        self.name, self.version = name, digest([path])
        kind = getattr(_module(path, self.version), own)
        self.scale, self.preprocessing = str(kind.scale), str(kind.preprocessing)
        if hasattr(kind, "version"):
            self.version += f"-{kind.version}"
        self.scorer: Any = kind(device) if inspect.signature(kind).parameters else kind()

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (N,), float32 on the CPU. Raises ValueError where the user's class does not give one for each picture."""
        if not images:
            return torch.empty(0)
        scores = torch.as_tensor(
            self.scorer([image.convert("RGB") for image in images], list(prompts))
        )
        if scores.shape != (len(images),):
            raise ValueError(
                f"{type(self.scorer).__name__} gave scores of shape {[*scores.shape]} for {len(images)} pictures, not one for each"
            )
        return scores.float().cpu()
