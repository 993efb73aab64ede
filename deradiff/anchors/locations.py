"""Where an anchor's files lie: a local folder or file, a hub repository, or a folder in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff import hub
from deradiff.anchors.weight_files import is_weights
from deradiff.text_files import read_json

LOCAL_PATTERNS = ("*", "*/config.json", "*/scheduler_config.json", "*/*.safetensors*", "*/*.bin")
"""The files of a local folder that may say something about an anchor."""

PARENTS_PATTERNS = ("model_index.json", "scheduler/scheduler_config.json")
"""The files of a pipeline that say something about the folder of one of its networks."""

CARD = "anchor.json"
PEFT_CONFIG = "adapter_config.json"

SHOWN_FOLDERS = 5
"""How many folders an error names."""


@dataclass(frozen=True)
class AnchorFiles:
    """The files among which an anchor is looked for.

    Attributes:
        root: a local folder or a hub id.
        folder: the folder below the root that the anchor lies in; empty: the root itself.
        names: the paths in that folder of the files that may say something about an anchor.
        parents_names: the same of the pipeline that the folder is a part of.
        requested: the one file that the user asked for; None: the whole folder.
        revision: the branch, tag or commit of the hub.
    """

    root: str
    folder: str
    names: Sequence[str]
    parents_names: Sequence[str]
    requested: str | None
    revision: str | None

    @property
    def is_local(self) -> bool:
        """Whether the root is a local folder."""
        return Path(self.root).is_dir()

    def path_of(self, name: str) -> str:
        """The path below the root of a file or folder that is named in the anchor's folder."""
        return "/".join(part for part in (self.folder, name) if part)

    def read_json(self, name: str) -> dict[str, Any]:
        """The content of a small JSON file in the anchor's folder.

        Raises:
            ValueError: where it is none.
        """
        return self._read_json(self.path_of(name))

    def read_parents_json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the pipeline that the folder is a part of.

        Raises:
            ValueError: where it is none.
        """
        if self.is_local and not self.folder:
            return read_json(Path(self.root).resolve().parent / name)
        parent = self.folder.rpartition("/")[0]
        return self._read_json(f"{parent}/{name}".removeprefix("/"))

    def _read_json(self, path: str) -> dict[str, Any]:
        if self.is_local:
            return read_json(Path(self.root) / path)
        return read_json(hub.fetch(self.root, path, self.revision))


def find_files(source: str, revision: str | None, subfolder: str | None) -> AnchorFiles:
    """The files of a source.

    Args:
        source: a file, a folder, or `org/name` of the hub with a folder or file in it.
        revision: a branch, tag or commit of the hub.
        subfolder: a folder in the source; the same as behind its name.

    Raises:
        ValueError: where nothing is there.
    """
    if subfolder:
        source = f"{source.rstrip('/')}/{subfolder.strip('/')}"
    path = Path(source)
    if path.is_file():
        names = [name for name in (path.name, PEFT_CONFIG) if (path.parent / name).is_file()]
        return AnchorFiles(str(path.parent), "", names, [], path.name, revision)
    if path.is_dir():
        # A train run's directory holds its anchor in a folder.
        if (path / "anchor" / CARD).is_file():
            path = path / "anchor"
        names = _files_in(path, LOCAL_PATTERNS)
        parents_names = _files_in(path.resolve().parent, PARENTS_PATTERNS)
        return AnchorFiles(str(path), "", names, parents_names, None, revision)
    return _find_on_hub(source, revision)


def _files_in(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files of a local folder that fit one of the patterns, by their path in it."""
    names: list[str] = []
    for pattern in patterns:
        for file in folder.glob(pattern):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name not in names:
                names.append(name)
    return names


def _find_on_hub(source: str, revision: str | None) -> AnchorFiles:
    """The files of `org/name`, `org/name/folder` or `org/name/.../file`. Raises ValueError."""
    parts = source.rstrip("/").split("/")
    repo = "/".join(parts[:2])
    if not hub.is_hub_id(repo):
        raise ValueError(
            f"there is no anchor {source}: give a folder or LoRA file that exists, or a hub id "
            "such as org/name"
        )
    try:
        root, all_names = hub.listing(repo, revision)
    except OSError as error:
        reason = hub.not_fetched("an anchor", repo, error, "anchor")
        raise ValueError(f"there is no anchor {source} on this machine: {reason}") from error

    # What lies behind the hub id is a file, or a folder that has files.
    rest = "/".join(parts[2:])
    requested = None
    if rest in all_names and is_weights(rest):
        rest, _, requested = rest.rpartition("/")
    names = _names_below(all_names, rest)
    if not names:
        raise ValueError(
            f"there is no anchor {source}: {repo} on the hub has no {rest}{places_of(all_names)}"
        )
    parent = rest.rpartition("/")[0]
    parents_names = _names_below(all_names, parent) if rest else []
    return AnchorFiles(root, rest, names, parents_names, requested, revision)


def _names_below(names: Sequence[str], folder: str) -> list[str]:
    """The files below a folder of a repository, by their path in it."""
    if not folder:
        return list(names)
    prefix = f"{folder}/"
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def places_of(names: Sequence[str]) -> str:
    """The end of an error: which of these files' folders hold weights; empty where none does.

    Args:
        names: paths of files.
    """
    folders: list[str] = []
    for name in names:
        folder = name.rpartition("/")[0]
        if folder and is_weights(name) and folder not in folders:
            folders.append(folder)
    if not folders:
        return ""
    more = ", ..." if len(folders) > SHOWN_FOLDERS else ""
    return f"; weights lie in {', '.join(sorted(folders)[:SHOWN_FOLDERS])}{more}"
