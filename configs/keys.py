"""The keys of a stage's config: what --help lists, and what an unknown one is likely to have meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

LEFT = 34  # columns of the key and its default in --help


def keys_of(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, its default, what its class says of it) of every setting, nested ones too."""
    meanings, types = _meanings(schema), get_type_hints(schema)
    for field in fields(schema):
        if is_dataclass(types[field.name]):
            yield from keys_of(types[field.name], f"{prefix}{field.name}.")
        else:
            meaning = field.metadata.get("help") or meanings.get(field.name, "")
            yield f"{prefix}{field.name}", _default(field), meaning


def _meanings(schema: type) -> dict[str, str]:
    """The docstring's `name: meaning.` and `one, other: meaning.`, where the names are the class's own fields."""
    names = {f.name for f in fields(schema)}
    text = " ".join((schema.__doc__ or "").split())
    heads = [
        m
        for m in re.finditer(r"(?:^|(?<=[.;] )|(?<=\) ))(\w+(?:, \w+)*): ", text)
        if set(m[1].split(", ")) <= names
    ]
    ends = [m.start() for m in heads[1:]] + [len(text)]
    return {
        name: text[m.end() : end].strip().rstrip(";.")
        for m, end in zip(heads, ends)
        for name in m[1].split(", ")
    }


def _default(field: Field[Any]) -> str:
    value = (
        field.default
        if field.default is not MISSING
        else field.default_factory()
        if field.default_factory is not MISSING
        else "???"
    )
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def groups_of(configs: Path) -> dict[str, list[str]]:
    """The config groups, each with the files that may be chosen."""
    found = {
        folder.name: sorted(f.stem for f in folder.glob("*.yaml"))
        for folder in sorted(configs.iterdir())
        if folder.is_dir()
    }
    return {name: files for name, files in found.items() if files}


def help_text(stage: str, schema: type, configs: Path) -> str:
    """What `python -m <stage> --help` prints: the groups with their choices, then every key with its default and meaning."""
    used = (configs / f"{stage}.yaml").read_text()
    lines = [f"python -m {stage} key=value ...", "", "a whole set of settings at once:"]
    lines += [
        f"  {name}={' | '.join(files)}"
        for name, files in groups_of(configs).items()
        if re.search(rf"- (override /?)?{name}:", used)
    ]
    lines += ["", "single settings, with what they are where nothing else says so:"]
    for key, default, meaning in keys_of(schema):
        left = f"  {key}={default}"
        lines.append(
            f"{left:<{LEFT}}  {meaning}".rstrip()
            if len(left) <= LEFT
            else f"{left}\n{'':<{LEFT}}  {meaning}".rstrip()
        )
    lines += [
        "",
        f"Several values: python -m {stage} --multirun key=1,2,3. A list: key=[1,2]. The composed config: --cfg job.",
    ]
    return "\n".join(lines)


def suggestion(key: str, schema: type, configs: Path) -> str:
    """ "; did you mean ...?" for a key that is none, or "" where nothing is near."""
    known = [name for name, _, _ in keys_of(schema)] + [*groups_of(configs)]
    near = get_close_matches(key, known, 1, 0.75)
    if not near:  # dpo.lr: the last part may be right and the group wrong; bta: the group left out
        last = {name.rpartition(".")[2]: name for name in known}
        near = [last[found] for found in get_close_matches(key.rpartition(".")[2], last, 1, 0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def is_list(key: str, schema: type) -> bool:
    """Whether a dotted key of the schema takes a list."""
    first, _, rest = key.partition(".")
    kind = get_type_hints(schema).get(first)
    if rest:
        return isinstance(kind, type) and is_dataclass(kind) and is_list(rest, kind)
    return getattr(kind, "__origin__", None) is list or any(
        getattr(k, "__origin__", None) is list for k in getattr(kind, "__args__", ())
    )
