"""Mistakes in a command line, each answered in one sentence that says what to type."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.keys import (
    LIKENESS,
    groups_of,
    instead_of,
    is_list,
    may_be_list,
    meaning_of,
    suggestion,
    usual_keys,
)
from deradiff.command_line import command_of
from deradiff.hub import is_hub_error

NO_MEMORY = "can't allocate memory"
"""What torch says of a CPU's memory."""

LESS_MEMORY = {
    "train": "a smaller optim.batch_size, model.resolution or finetune.rank, or "
    "model.gradient_checkpointing=true",
    "sample": "a smaller batch_size, height and width, or dtype=bfloat16",
    "eval": "a smaller batch_size",
}
"""What takes less memory, by stage."""

OURS = ("deradiff", "configs", "train", "sample", "eval", "hydra_plugins")
"""The packages of this project."""

QUOTE = "quote a value that holds a comma or a bracket: \"prompts=['a fox, red']\""


@dataclass(frozen=True)
class Command:
    """A command line of a stage.

    Attributes:
        stage: its name.
        schema: the config's dataclass.
        configs: the folder of the config files.
        arguments: what follows the stage's name.
    """

    stage: str
    schema: type
    configs: Path
    arguments: Sequence[str]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The config groups of the stage, with their choices."""
        return groups_of(self.configs, self.stage)

    def key_like(self, name: str) -> str:
        """The key or group that a name means; empty where none is like it."""
        if self.answer_to(name):
            return ""
        return suggestion(name, self.schema, self.groups)

    def answer_to(self, name: str) -> str:
        """What to type instead of a setting that one may look for; empty for any other."""
        return instead_of(self.schema).get(name.rpartition(".")[2], "")

    def assignment(self, key: str, value: str) -> str:
        """`key=value` as a shell takes it, in brackets where the key takes a list."""
        is_bare = not value.startswith(("[", "{"))
        if is_bare and is_list(key, self.schema):
            value = f"[{value}]"
        return shlex.quote(f"{key}={value}")

    def value_of(self, key: str) -> str:
        """The value that the user typed for a key."""
        for argument in self.arguments:
            name, _, value = argument.partition("=")
            if name.lstrip("+") == key:
                return value
        return "..."


def check_arguments(command: Command) -> None:
    """Refuse arguments that Hydra would not read at all.

    Args:
        command: the command line.

    Raises:
        ValueError: in one sentence.
    """
    refusal = _refusal(command)
    if refusal:
        raise ValueError(refusal)


def _refusal(command: Command) -> str | None:
    """What is wrong with the first argument that is no setting and no flag; None: none is."""
    flags = _hydra_flags()
    waiting = list(command.arguments)
    while waiting:
        argument = waiting.pop(0)
        name = argument.partition("=")[0]
        if name in flags:
            if flags[name] and "=" not in argument and waiting:
                waiting.pop(0)
            continue
        split = _split_list(argument, waiting)
        if split:
            return f"the shell took {split} apart at a space: type {shlex.quote(split)}"
        if argument.startswith("-"):
            return _dashes(command, argument, waiting)
        if "=" not in argument and not argument.startswith("~"):
            return _bare_word(command, argument, waiting)
        if argument.startswith("="):
            return f"cannot read {argument}: write key=value, without spaces around ="
    return None


def _hydra_flags() -> dict[str, bool]:
    """Every flag of Hydra's, and whether a value follows it."""
    flags = {}
    for action in get_args_parser()._actions:
        for name in action.option_strings:
            flags[name] = action.nargs is None
    return flags


def _open_brackets(text: str) -> int:
    """How many brackets of a text are opened and not closed, those in quotes aside."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return sum(map(text.count, "[{(")) - sum(map(text.count, "]})"))


def _split_list(argument: str, following: Sequence[str]) -> str:
    """A list that was typed with spaces and without quotes, as it was meant; empty for no list."""
    words = [argument]
    for word in following:
        if _open_brackets(" ".join(words)) <= 0:
            break
        words.append(word)
    whole = " ".join(words)
    return whole if len(words) > 1 and _open_brackets(whole) == 0 else ""


def _dashes(command: Command, argument: str, following: Sequence[str]) -> str:
    """A key in the form of a flag: `--beta 500` or `--beta=500`."""
    name, is_assigned, value = argument.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not is_assigned:
        value = _value_behind(following) or "..."
    key = command.key_like(name)
    if not key:
        return f"settings are written key=value, and {_unknown(command, name)}"
    return f"settings are written without dashes: type {command.assignment(key, value)}"


def _bare_word(command: Command, word: str, following: Sequence[str]) -> str:
    """A word without `=`: a key, a choice of a group, or a path."""
    # anchor = x, anchor x
    key = command.key_like(word)
    value = _value_behind(following).lstrip("=")
    if not value and following:
        value = _value_behind(following[1:])
    if key and value:
        return f"settings are written key=value: type {command.assignment(key, value)}"

    # sdxl, lora
    for group, choices in command.groups.items():
        if word in choices:
            return f"{word} alone says nothing: type {group}={word}"

    # The stage's own key takes a path.
    usual = usual_keys(command.schema)
    if "/" in word and usual:
        return f"{word} alone says nothing: type {command.assignment(usual[0], word)}"
    return f"cannot read {word}: write key=value, and {QUOTE}"


def _value_behind(following: Sequence[str]) -> str:
    """The value that may follow a key; empty where another setting follows."""
    value = following[0] if following else ""
    is_flag = value.startswith("-") and not value[1:2].isdigit()
    is_setting = re.match(r"[\w.+~@/-]+=", value) is not None
    return "" if is_flag or is_setting else value


def sentence(error: BaseException, command: Command) -> str:
    """An error as one sentence: what is wrong, where, and what was probably meant.

    Args:
        error: of Hydra, of OmegaConf, or of a check.
        command: the command line.
    """
    # Hydra and OmegaConf wrap an error in others, of which the innermost says most.
    cause = error
    while cause.__cause__ is not None and isinstance(
        cause, HydraException | OmegaConfBaseException
    ):
        cause = cause.__cause__
    text = str(cause).strip() or type(cause).__name__
    first_line = text.split("\n")[0]

    # Mistakes that Hydra words for its own developers, in the user's words.
    if isinstance(cause, OverrideParseException):
        quoted = _quoted(cause.override)
        advice = f"type {quoted}" if quoted else f"write key=value, and {QUOTE}"
        return f"cannot read {cause.override}: {advice}"
    full_key = re.search(r"full_key: (\S+)", text)
    if full_key:
        return _about_key(full_key[1], cause, first_line, command)
    ambiguous = re.search(r"Ambiguous value for argument '(.*)'", first_line)
    if ambiguous:
        return _several_values(ambiguous[1], command)
    if is_memory_error(cause):
        less = LESS_MEMORY.get(command.stage, "smaller batches")
        return f"there is not enough memory ({first_line[:200].rstrip('.')}): give {less}"
    if is_hub_error(cause):
        return (
            f"the hub could not be read ({type(cause).__name__}: {first_line.rstrip('.')}): give "
            "local folders, or set HF_HOME to a cache that hf download <org/name> has filled"
        )
    return _about_group(text, command) or (text if _is_ours(cause) else first_line)


def is_memory_error(error: BaseException) -> bool:
    """Whether a device or this machine had too little memory.

    Args:
        error: of torch, which is not imported here, or of Python.
    """
    is_of_device = type(error).__name__ == "OutOfMemoryError"
    return is_of_device or isinstance(error, MemoryError) or NO_MEMORY in str(error)


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project, whose messages have one line.

    A line break in one is part of a file's name.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames:
        return False
    module = str(frames[-1].f_globals.get("__name__", ""))
    return module.partition(".")[0] in OURS


def _quoted(argument: str) -> str:
    """A setting with its value in quotes, as a shell takes it; empty where it needs none.

    Hydra asks for quotes around letters that are not English, and around `=`, as in a path.
    """
    key, is_assigned, value = argument.partition("=")
    if not is_assigned or value.startswith(("[", "{", "'", '"')):
        return ""
    escaped = value.replace("'", "\\'")
    setting = f"{key}='{escaped}'"
    try:
        OverridesParser.create().parse_overrides([setting])
    except HydraException:
        return ""
    is_plain = not set(setting) & set('"$`\\!')
    return f'"{setting}"' if is_plain else shlex.quote(setting)


def _about_key(key: str, cause: BaseException, first_line: str, command: Command) -> str:
    """A mistake in one key, by the key's full name."""
    if isinstance(cause, MissingMandatoryValue):
        meaning = meaning_of(key, command.schema)
        return f"{key} is missing: give {key}=..." + (f" ({meaning})" if meaning else "")
    if first_line.startswith("Key "):
        return _unknown(command, _whole_key(key, command.arguments))
    value = command.value_of(key)
    if is_list(key, command.schema) and not value.startswith("["):
        return f"{key} is a list: give {command.assignment(key, value)}"
    return f"{first_line} ({key})"


def _whole_key(start: str, arguments: Sequence[str]) -> str:
    """The key as it was typed: of `lora.rank` Hydra names `lora` alone, which is not there."""
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("+")
        if name.startswith(f"{start}."):
            return name
    return start


def _unknown(command: Command, name: str) -> str:
    """What to say of a key that is not there."""
    answer = command.answer_to(name)
    if answer:
        return f"there is no setting {name}: {answer}"
    meant = command.key_like(name)
    if not meant:
        return f"there is no setting {name}; {command_of(command.stage)} --help lists all"
    return (
        f"there is no setting {name}; did you mean "
        f"{command.assignment(meant, command.value_of(name))}?"
    )


def _several_values(argument: str, command: Command) -> str:
    """Values with commas between them and no brackets around them."""
    key, _, value = argument.partition("=")
    if Path(value).exists():
        return f"{argument} holds a comma: type {_quoted(argument)}"
    as_list = shlex.quote(f"{key}=[{value}]")
    swept = f"{command_of(command.stage)} --multirun {shlex.quote(argument)}"
    if is_list(key, command.schema):
        return f"{key} is a list: type {as_list}"
    if " " in value:
        quoted = f"\"{key}=['{value}']\""
        return f"{argument} holds a comma: type {quoted} for one text, {as_list} for several"
    if may_be_list(key, command.schema):
        return f"{argument} is several values: type {as_list}, or {swept} for a run of each"
    return f"{key} takes one value: type {swept} for a run of each"


def _about_group(text: str, command: Command) -> str:
    """A mistake in the choice of a group; empty where an error is about none."""
    found = re.search(r"Could not (?:find|load) '([\w/]+)/([^/']+)'", text)
    if found is None or found[1] not in command.groups:
        return ""
    group, choice = found.groups()
    choices = command.groups[group]
    near = get_close_matches(choice, choices, 1, LIKENESS)
    meant = f"type {group}={near[0]}, or another of" if near else "there are"
    return f"there is no {group}={choice}; {meant} {', '.join(choices)}"
