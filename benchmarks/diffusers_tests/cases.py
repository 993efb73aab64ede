"""The cases: every class of diffusers' tests that builds an image or a video pipeline.

diffusers' tests have, for each pipeline, dummy components (tiny random networks) and the arguments
of a call. They are not part of its package: they are read from a checkout of its repository.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.diffusers_tests.own_cases import OWN_CASES
from benchmarks.diffusers_tests.scheduler_cases import schedulers_in

PIPELINE_TESTS = "tests/pipelines"

OTHER_OUTPUTS = (
    "ace_step",
    "audioldm2",
    "diffusion_gemma",
    "llada2",
    "longcat_audio_dit",
    "shap_e",
    "stable_audio",
    "stable_audio_3",
)
"""The folders of pipelines that make sound, text or shapes."""

SCHEDULER_TESTS = (
    ("stable_diffusion.test_stable_diffusion", "StableDiffusionPipelineTesterConfig"),
    ("stable_diffusion_xl.test_stable_diffusion_xl", "StableDiffusionXLPipelineFastTests"),
)
"""The classes of diffusers' tests, by their module, whose pipelines get other schedulers."""

VIDEO_WORDS = ("video", "frames")
"""Some argument of a pipeline that makes videos has one of these in its name."""

NOT_TINY = ("Slow", "Nightly", "Integration", "Dummies")
"""Parts of the names of test classes that load published weights, or only lend components."""


@dataclass(frozen=True)
class Case:
    """A test class that builds a pipeline, or a file of tests that could not be imported.

    Attributes:
        name: `flux/test_pipeline_flux.py::FluxPipelineTesterConfig`.
        test_class: the class; None: its file could not be imported.
        kind: what its pipeline makes, `image` or `video`; `own` for a case of OWN_CASES,
            `scheduler` for one of a scheduler.
        problem: why its file could not be imported; empty: it was.
    """

    name: str
    test_class: Any
    kind: str = "image"
    problem: str = ""

    @property
    def pipeline(self) -> str:
        """The name of the pipeline's class."""
        return self.test_class.pipeline_class.__name__ if self.test_class else ""


def find_cases(checkout: Path, pattern: str) -> list[Case]:
    """All cases of a checkout, those of pipelines that its tests do not build, and of schedulers.

    Args:
        checkout: of diffusers' repository; its tests are imported.
        pattern: a regular expression that the names of the files hold.

    Raises:
        ValueError: where no tests of pipelines lie there.
    """
    folder = checkout / PIPELINE_TESTS
    if not folder.is_dir():
        raise ValueError(
            f"{checkout} has no folder {PIPELINE_TESTS}: give a checkout of diffusers' repository, "
            "of the version that is installed"
        )
    sys.path.insert(0, str(checkout.resolve()))
    cases: list[Case] = []
    for file in sorted(folder.glob("*/test_*.py")):
        name = f"{file.parent.name}/{file.name}"
        is_other = file.parent.name in OTHER_OUTPUTS or "onnx" in file.name
        if not is_other and re.search(pattern, name):
            cases += _cases_of(file, name)
    for own_case in OWN_CASES:
        name = f"own_cases.py::{own_case.__name__}"
        if re.search(pattern, name):
            cases.append(Case(name, own_case, "own"))
    if re.search(pattern, "schedulers"):
        cases += _cases_of_schedulers()
    return cases


def _cases_of_schedulers() -> Iterator[Case]:
    """A case for each scheduler in the pipelines of SD1.5 and SDXL."""
    for number, (file, name) in enumerate(SCHEDULER_TESTS):
        module = importlib.import_module(f"tests.pipelines.{file}")
        found = schedulers_in(getattr(module, name), with_variants=number == 0)
        for scheduler, test_class in found:
            yield Case(f"schedulers/{name}::{scheduler}", test_class, "scheduler")


def _cases_of(file: Path, name: str) -> Iterator[Case]:
    """The cases of one file."""
    try:
        module = importlib.import_module(f"tests.pipelines.{file.parent.name}.{file.stem}")
    except Exception as error:
        yield Case(name, None, problem=f"{type(error).__name__}: {error}")
        return

    # A file has several classes on the same components, one for each subject of its tests.
    seen = set()
    for test_class in _test_classes(module):
        builders = (test_class.get_dummy_components, test_class.get_dummy_inputs)
        key = (test_class.pipeline_class, *builders)
        if key in seen:
            continue
        seen.add(key)
        call = inspect.signature(test_class.pipeline_class.__call__)
        arguments = " ".join(call.parameters)
        kind = "video" if any(word in arguments for word in VIDEO_WORDS) else "image"
        yield Case(f"{name}::{test_class.__name__}", test_class, kind)


def _test_classes(module: ModuleType) -> Iterator[Any]:
    """The classes of a module of tests that build a pipeline of tiny networks."""
    for name, member in vars(module).items():
        if not inspect.isclass(member) or member.__module__ != module.__name__:
            continue
        if any(part in name for part in NOT_TINY):
            continue
        has_pipeline = isinstance(inspect.getattr_static(member, "pipeline_class", None), type)
        if has_pipeline and hasattr(member, "get_dummy_inputs") and _builds(member):
            yield member


def _builds(test_class: Any) -> bool:
    """Whether a test class builds its components without being told more."""
    make = getattr(test_class, "get_dummy_components", None)
    if make is None:
        return False
    _, *parameters = inspect.signature(make).parameters.values()
    return all(parameter.default is not inspect.Parameter.empty for parameter in parameters)
