"""The families that deradiff knows, and which of them a pipeline or a checkpoint belongs to.

A new family is one file beside this one (see `deradiff.models.family`) and one row here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deradiff.models.chroma import CHROMA
from deradiff.models.family import Family, unwrapped
from deradiff.models.flux import FLUX
from deradiff.models.flux2 import FLUX2, FLUX2_KLEIN
from deradiff.models.qwen_image import QWEN_IMAGE
from deradiff.models.sana import SANA
from deradiff.models.sd3 import SD3
from deradiff.models.unet import SD15, SDXL
from deradiff.models.z_image import Z_IMAGE

# A family whose single files also hold another one's names comes after that one.
_ALL = (SD15, SDXL, SD3, FLUX, QWEN_IMAGE, Z_IMAGE, CHROMA, FLUX2_KLEIN, FLUX2, SANA)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

DENOISERS = tuple(dict.fromkeys(family.denoiser for family in FAMILIES.values()))
"""The attributes of a pipeline, and folders of a checkpoint, that may hold a denoiser."""

VARIANTS = "(ControlNet(Union)?)?(Img2Img|Inpaint|Inpainting)?"
"""Pipelines of a family beside text-to-image; all of them call the denoiser in the same way."""


def family_of(pipe: Any) -> Family:
    """The family of a loaded diffusers pipeline.

    A pipeline that was loaded without its denoiser, to encode, goes by its class.

    Args:
        pipe: a text-to-image, img2img, inpainting or ControlNet pipeline.

    Raises:
        ValueError: for a pipeline of no known family.
    """
    classes = {name: class_names(unwrapped(getattr(pipe, name, None))) for name in DENOISERS}
    pipeline_classes = [cls.__name__ for cls in type(pipe).__mro__]
    has_denoiser = any(classes.values())
    return _find_family(pipeline_classes, classes, "the pipeline", needs_denoiser=has_denoiser)


def family_of_index(index: Mapping[str, Any], source: str) -> Family:
    """The family of a checkpoint, by its `model_index.json`.

    Args:
        index: the file's content.
        source: the checkpoint's name, for the error.

    Raises:
        ValueError: for a pipeline of no known family.
    """
    classes = {}
    for name in DENOISERS:
        entry = index.get(name)
        if isinstance(entry, list) and entry[1]:
            classes[name] = [entry[1]]
    return _find_family([index["_class_name"]], classes, source, needs_denoiser=True)


def family_of_config(config: Mapping[str, Any]) -> Family | None:
    """The family of a denoiser, by its `config.json`; None for a network of no known family."""
    for family in FAMILIES.values():
        if family.owns_config(config):
            return family
    return None


def family_of_original(names: Iterable[str]) -> Family | None:
    """The family of a network in its authors' single-file layout, by the names of its tensors.

    Args:
        names: without the prefix of a whole checkpoint.
    """
    names = list(names)
    found = None
    for family in FAMILIES.values():
        if family.owns_original(names):
            found = family
    return found


def class_names(network: Any) -> list[str]:
    """A network's class and the classes that it inherits from: FSDP2 and users make subclasses."""
    return [] if network is None else [cls.__name__ for cls in type(network).__mro__]


def _find_family(
    pipeline_classes: Sequence[str],
    denoiser_classes: Mapping[str, Sequence[str]],
    source: str,
    needs_denoiser: bool,
) -> Family:
    """The family whose pipeline is among the classes and whose denoiser fits. Raises ValueError."""
    for family in FAMILIES.values():
        stem = family.pipeline.removesuffix("Pipeline")
        variants = re.compile(f"{stem}{VARIANTS}Pipeline")
        is_pipeline = any(variants.fullmatch(name) for name in pipeline_classes)
        has_denoiser = family.denoiser_class in denoiser_classes.get(family.denoiser, ())
        if is_pipeline and (has_denoiser or not needs_denoiser):
            return family

    denoiser = ""
    for names in denoiser_classes.values():
        if names and not denoiser:
            denoiser = f" with a {names[0]}"
    known = ", ".join(FAMILIES)
    raise ValueError(
        f"{source} is a {pipeline_classes[0]}{denoiser}, which belongs to no family that deradiff "
        f"knows ({known}, and their variants)"
    )
