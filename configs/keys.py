"""The keys of a stage's config: what --help lists, and what an unknown one probably meant."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

KEY_WIDTH = 34
"""Columns of a key and its default in --help."""

LIKENESS = 0.75
"""How alike two keys must be for one to be suggested; 1: equal."""

YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: dotted.
        default: as YAML writes it.
        meaning: its help text.
    """

    name: str
    default: str
    meaning: str


def keys_of(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every setting of a config, nested ones too, in the order of the dataclasses."""
    types_of = get_type_hints(schema)
    for field in fields(schema):
        name = f"{prefix}{field.name}"
        if is_dataclass(types_of[field.name]):
            yield from keys_of(types_of[field.name], f"{name}.")
        else:
            yield Key(name, _default(field), field.metadata.get("help", ""))


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        value = "???"
    return YAML_WORDS.get(str(value), str(value))


def groups_of(configs: Path) -> dict[str, list[str]]:
    """The config groups, each with the files that may be chosen."""
    groups = {}
    for folder in sorted(configs.iterdir()):
        files = sorted(file.stem for file in folder.glob("*.yaml")) if folder.is_dir() else []
        if files:
            groups[folder.name] = files
    return groups


def help_text(stage: str, schema: type, configs: Path) -> str:
    """What `python -m <stage> --help` prints: groups with their choices, then every key."""
    # The groups that the stage's config takes a file from.
    composed = (configs / f"{stage}.yaml").read_text()
    command = f"python -m {stage}"
    lines = [f"{command} key=value ...", "", "a whole set of settings at once:"]
    for name, files in groups_of(configs).items():
        if re.search(rf"- (override /?)?{name}:", composed):
            lines.append(f"  {name}={' | '.join(files)}")

    # Every key, and how several values are written.
    lines += ["", "single settings, with what they are where nothing else says so:"]
    lines += [_help_line(key) for key in keys_of(schema)]
    lines += [
        "",
        f"Several values: {command} --multirun key=1,2,3. A list: key=[1,2]. "
        "The composed config: --cfg job.",
    ]
    return "\n".join(lines)


def _help_line(key: Key) -> str:
    """A key with its default and meaning, on two lines where the first is too long."""
    left = f"  {key.name}={key.default}"
    if len(left) <= KEY_WIDTH:
        return f"{left:<{KEY_WIDTH}}  {key.meaning}".rstrip()
    return f"{left}\n{'':<{KEY_WIDTH}}  {key.meaning}".rstrip()


def suggestion(key: str, schema: type, configs: Path) -> str:
    """ "; did you mean ...?" for an unknown key, or "" where no known one is like it."""
    # The whole key, or a group, with a slip of the keyboard.
    known = [one.name for one in keys_of(schema)] + [*groups_of(configs)]
    near = get_close_matches(key, known, 1, LIKENESS)
    if near:
        return f"; did you mean {near[0]}?"

    # dpo.lr: the last part may be right and the group wrong. bta: the group is missing.
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    near = get_close_matches(key.rpartition(".")[2], by_last_part, 1, LIKENESS)
    return f"; did you mean {by_last_part[near[0]]}?" if near else ""


def is_list(key: str, schema: type) -> bool:
    """Whether a dotted key of the schema takes a list."""
    first, _, rest = key.partition(".")
    kind = get_type_hints(schema).get(first)
    if rest:
        return isinstance(kind, type) and is_dataclass(kind) and is_list(rest, kind)
    return any(get_origin(one) is list for one in _alternatives(kind))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union such as `list[int] | None`; otherwise the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return get_args(kind)
    return (kind,)
