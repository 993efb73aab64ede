"""Pages that mkdocs makes: the API reference from the docstrings, and the repository's own pages.

mkdocs-gen-files runs this file for `make docs`. A public name without a docstring stops it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import mkdocs_gen_files

ROOT = Path(__file__).parents[1]
PUBLIC_NAMES = (
    "realign",
    "Dial",
    "ramp",
    "piecewise",
    "ByBranch",
    "RealignGuidance",
    "sweep",
    "Sweep",
    "calibrate",
    "Calibration",
    "load_anchor",
    "Anchor",
    "AnchorCard",
    "save_anchor",
    "adapter_anchor",
    "bake",
    "load_scorer",
)
"""The names of `deradiff`, in the order in which its page explains them."""

ROOMS = {
    "deradiff": "The public names",
    "deradiff.method": "The mathematics of the paper",
    "deradiff.realignment": "Inside a diffusers pipeline",
    "deradiff.anchors": "Aligned models as files",
    "deradiff.models": "Model families",
    "deradiff.training": "Training",
    "deradiff.calibration": "What lambda is worth",
    "deradiff.data": "Preference data",
    "deradiff.scorers": "Scorers",
    "deradiff.evaluation": "Evaluation",
    "deradiff.worlds": "Small worlds",
    "other": "Files, the hub, the commands",
}
"""The parts of the library, in the order of the site's list. A room is a folder; `other` is what
lies in none."""

NOT_LISTED = {"deradiff.__main__"}
REPOSITORY_PAGES = {
    "RESULTS.md": "results.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def public_modules(package: griffe.Module) -> Iterator[griffe.Module]:
    """A package and its modules, in reading order; names that begin with `_` are left out."""
    if package.path not in NOT_LISTED and (package.docstring or package.members):
        yield package
    for name, module in sorted(package.modules.items()):
        if not name.startswith("_") and isinstance(module, griffe.Module):
            yield from public_modules(module)


def undocumented(module: griffe.Module) -> Iterator[str]:
    """The paths of public functions, classes and methods of a module that have no docstring."""
    if module.docstring is None:
        yield module.path
    for item in module.members.values():
        if item.is_alias or not item.is_public or item.is_module:
            continue
        if (item.is_function or item.is_class) and item.docstring is None:
            yield item.path
        if item.is_class:
            yield from undocumented_methods(item)


def undocumented_methods(item: griffe.Object) -> Iterator[str]:
    """The paths of a class's public methods without a docstring; inherited ones do not count."""
    for method in item.members.values():
        is_ours = method.is_function and not method.is_alias and not method.name.startswith("_")
        if is_ours and method.docstring is None and not overrides(item, method.name):
            yield method.path


def overrides(item: griffe.Object, name: str) -> bool:
    """Whether a class of ours that this one inherits from describes the method."""
    return any(name in base.members for base in item.mro())


def room_of(path: str) -> str:
    """The entry of `ROOMS` that a module is listed under."""
    room = ".".join(path.split(".")[:2])
    return room if room in ROOMS else "other"


def page_of(module: griffe.Module) -> str:
    """The text of a module's page: mkdocstrings fills it in.

    Raises:
        SystemExit: where the package has a public name that `PUBLIC_NAMES` lacks, or the reverse.
    """
    text = f"# {module.path}\n\n::: {module.path}\n"
    if module.path != "deradiff":
        return text
    if set(PUBLIC_NAMES) != set(module.exports or []):
        raise SystemExit("docs/generate_pages.py: PUBLIC_NAMES is not deradiff.__all__")
    members = ", ".join(PUBLIC_NAMES)
    return f"{text}    options:\n      group_by_category: false\n      members: [{members}]\n"


def write_reference() -> None:
    """A page for each module below api/, and the list of them.

    Raises:
        SystemExit: where a public name has no docstring.
    """
    package = griffe.load("deradiff", search_paths=[str(ROOT)])
    modules = list(public_modules(package))
    missing: list[str] = []
    for module in modules:
        missing += undocumented(module)
    if missing:
        raise SystemExit("no docstring: " + ", ".join(missing))

    lines: dict[str, list[str]] = {room: [] for room in ROOMS}
    for module in modules:
        page = f"{module.path.replace('.', '/')}.md"
        with mkdocs_gen_files.open(f"api/{page}", "w") as file:
            file.write(page_of(module))
        lines[room_of(module.path)].append(f"    * [{module.path}]({page})\n")

    with mkdocs_gen_files.open("api/SUMMARY.md", "w") as summary:
        for room, title in ROOMS.items():
            summary.write(f"* {title}\n")
            summary.writelines(lines[room])


def write_repository_pages() -> None:
    """Copies of the pages at the top of the repository, their links turned to the site's."""
    for source, page in REPOSITORY_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](README.md)", "](index.md)")
        for name, target in REPOSITORY_PAGES.items():
            text = text.replace(f"]({name})", f"]({target})")
        with mkdocs_gen_files.open(page, "w") as file:
            file.write(text)


def link_to_site_pages() -> None:
    """In the pages of docs/, `../RESULTS.md` of a checkout becomes `results.md` of the site."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for name, target in REPOSITORY_PAGES.items():
            text = text.replace(f"](../{name}", f"]({target}")
        text = re.sub(r"\]\(\.\./README\.md", "](index.md", text)
        with mkdocs_gen_files.open(path.name, "w") as file:
            file.write(text)


write_reference()
write_repository_pages()
link_to_site_pages()
