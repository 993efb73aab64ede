"""The keys of a stage's config: what --help lists, and what an unknown one probably meant."""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from deradiff.command_line import command_of

KEY_WIDTH = 26
"""Columns of a key in --help."""

WIDTH = 100
"""Columns of --help."""

LIKENESS = 0.75
"""How alike two keys must be for one to be suggested; 1: equal."""

SHORTEST_START = 3
"""Letters that the beginning of a key must have to be taken for it."""

GROUPS = {
    "model": "the base model",
    "data": "the examples",
    "finetune": "which weights are trained",
    "experiment": "a whole recipe, which overrides the other groups",
    "scorers": "what images are scored by, or several as in scorers=[clip,pickscore]",
    "optim": "steps, optimiser and rate, by itself those of model and finetune",
    "tracking": "where numbers and images go",
}
"""What the config groups are, those first that one changes most."""

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


def groups_of(configs: Path, stage: str) -> dict[str, list[str]]:
    """The config groups of a stage, each with the files that may be chosen, in a reader's order."""
    groups = {}
    for name in [*GROUPS, *sorted(folder.name for folder in configs.iterdir())]:
        files = sorted(file.stem for file in (configs / name).glob("*.yaml"))
        if files and _default_choice(name, configs, stage) is not None:
            groups[name] = files
    return groups


def _default_choice(group: str, configs: Path, stage: str) -> str | None:
    """What a stage's config takes of a group by itself; None: it has no such group."""
    composed = (configs / f"{stage}.yaml").read_text()
    found = re.search(rf"- (?:override /?)?{group}: *([^#\n]*)", composed)
    return found[1].strip() if found else None


def help_text(stage: str, schema: type, configs: Path) -> str:
    """What `python -m <stage> --help` prints: groups with their choices, then every key."""
    # The groups that the stage's config takes a file from.
    command = command_of(stage)
    lines = [f"{command} key=value ...", "", "Sets of settings, group=choice:"]
    for name, files in groups_of(configs, stage).items():
        meaning = " | ".join(files)
        if name in GROUPS:
            meaning = f"{GROUPS[name]}: {meaning}"
        default = str(_default_choice(name, configs, stage))
        is_plain = default != "null" and "$" not in default
        lines.append(_help_line(name, meaning, default if is_plain else ""))

    # Every key, those first that are changed most.
    keys = {key.name: key for key in keys_of(schema)}
    usual = usual_keys(schema)
    lines += ["", "What one changes most, key=value; a default is what it is where no set says so:"]
    lines += [_help_line(name, keys[name].meaning, keys[name].default) for name in usual]
    lines += ["", "Everything else:"]
    for key in keys.values():
        if key.name not in usual:
            lines.append(_help_line(key.name, key.meaning, key.default))

    # How several values are written.
    lines += [
        "",
        f"A list: 'key=[1,2]'. A run for each of several values: {command} --multirun key=1,2.",
        "The composed config: --cfg job.",
    ]
    return "\n".join(lines)


def usual_keys(schema: type) -> tuple[str, ...]:
    """The keys that one changes most, the stage's own first."""
    return getattr(schema, "USUAL", ())


def instead_of(schema: type) -> dict[str, str]:
    """Settings that one may look for by the last part of a key, and what to type instead."""
    return getattr(schema, "INSTEAD_OF", {})


def _help_line(name: str, meaning: str, default: str) -> str:
    """A key or a group with its meaning, then its default."""
    indent = " " * KEY_WIDTH
    text = f"{meaning} (default: {default})" if default else meaning
    lines = textwrap.wrap(text, WIDTH - KEY_WIDTH, break_on_hyphens=False)
    left = f"  {name}"
    if len(left) < KEY_WIDTH and lines:
        return f"\n{indent}".join([f"{left:<{KEY_WIDTH}}{lines[0]}", *lines[1:]])
    return f"\n{indent}".join([left, *lines])


def meaning_of(name: str, schema: type) -> str:
    """The help text of a key; empty where it has none."""
    return next((key.meaning for key in keys_of(schema) if key.name == name), "")


def suggestion(name: str, schema: type, groups: Collection[str]) -> str:
    """The key or group that a name means; empty where none is like it.

    Args:
        name: as the user typed it.
        schema: the config's dataclass.
        groups: the stage's config groups.
    """
    # The whole key, or a group, perhaps with a slip of the keyboard.
    known = [*(key.name for key in keys_of(schema)), *groups]
    if name in known:
        return name
    by_last_part: dict[str, str] = {}
    for one in sorted(known, key=lambda one: one not in usual_keys(schema)):
        by_last_part.setdefault(one.rpartition(".")[2], one)
    last_part = name.rpartition(".")[2]

    # dpo.lr: the last part may be right and the group wrong. beta: the group is missing.
    if last_part in by_last_part:
        return by_last_part[last_part]
    near = get_close_matches(name, known, 1, LIKENESS)
    if near:
        return near[0]
    near = get_close_matches(last_part, by_last_part, 1, LIKENESS)
    if near:
        return by_last_part[near[0]]

    # lam: the beginning of a key. max_train_steps: its end.
    for one, whole in by_last_part.items():
        is_start = len(last_part) >= SHORTEST_START and one.startswith(last_part)
        if is_start or last_part.endswith(f"_{one}"):
            return whole
    return ""


def is_list(key: str, schema: type) -> bool:
    """Whether a dotted key of the schema takes a list, and nothing else."""
    field = _field_of(key, schema)
    if field is None:
        return False
    if field.metadata.get("is_list"):
        return True
    return any(get_origin(one) is list for one in _alternatives(_type_of(key, schema)))


def may_be_list(key: str, schema: type) -> bool:
    """Whether a dotted key of the schema takes a list, or something else."""
    return _type_of(key, schema) is Any


def _field_of(key: str, schema: type) -> Field[Any] | None:
    """The field of a dotted key; None where there is none."""
    first, _, rest = key.partition(".")
    for field in fields(schema):
        if field.name == first and rest:
            kind = get_type_hints(schema)[first]
            is_section = isinstance(kind, type) and is_dataclass(kind)
            return _field_of(rest, kind) if is_section else None
        if field.name == first:
            return field
    return None


def _type_of(key: str, schema: type) -> Any:
    """The type of a dotted key; None where there is none."""
    first, _, rest = key.partition(".")
    kind = get_type_hints(schema).get(first)
    if not rest:
        return kind
    return _type_of(rest, kind) if isinstance(kind, type) and is_dataclass(kind) else None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union such as `list[int] | None`; otherwise the type itself."""
    if get_origin(kind) in (Union, types.UnionType):
        return get_args(kind)
    return (kind,)
