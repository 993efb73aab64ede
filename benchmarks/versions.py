"""`python -m benchmarks.versions`: the default tests with the oldest and the newest packages that
pyproject.toml allows, as one table.

Each row is an environment of its own below `runs/versions`, made anew, with pip's log and that of
the tests beside it. `oldest` installs the lower bounds of pyproject.toml, `newest` what pip
resolves. The exit status is 0 where no row failed, and 1 where one did. This program needs nothing
but Python.

python -m benchmarks.versions                               3.11 oldest, 3.11 to 3.13 newest
python -m benchmarks.versions --row 3.12:newest             one row
python -m benchmarks.versions --pin torch==2.13.0           another version than a row's own
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

OLDEST = "oldest"
NEWEST = "newest"
ROWS = ("3.11:oldest", "3.11:newest", "3.12:newest", "3.13:newest")

SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "pandas", "numpy")
"""Packages whose versions are in the table."""

PASSED = "passed"
FAILED = "FAILED"
NOT_RUN = "not run"
"""How a row ends. `not run`: its Python is not on this machine."""


@dataclass(frozen=True)
class Row:
    """An environment, and what became of the tests in it.

    Attributes:
        python: the version, such as `3.11`.
        packages: OLDEST or NEWEST.
        status: PASSED, FAILED or NOT_RUN.
        note: how many tests passed, or why none was run.
        versions: of the packages that were installed, by name.
    """

    python: str
    packages: str
    status: str
    note: str
    versions: Mapping[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Test every environment, print and write the table; returns the exit status."""
    options = parse_arguments(arguments)
    rows = []
    for name in options.row or ROWS:
        python, _, packages = name.partition(":")
        row = check(python, packages, options.pin, options.out / name.replace(":", "-"))
        print(f"versions: {name}: {row.status}: {row.note}", flush=True)
        rows.append(row)
    table = markdown(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(table + "\n")
    print("\n" + table)
    return int(any(row.status == FAILED for row in rows))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--row",
        action="append",
        metavar="PYTHON:PACKAGES",
        type=_row_name,
        help=f"oldest or newest on one version of Python; default: {' '.join(ROWS)}",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="PACKAGE==VERSION",
        help="install this version in every row, such as a torch that lies on this disk",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/versions"), help="folder of it all")
    return parser.parse_args(arguments)


def _row_name(text: str) -> str:
    """`3.11:oldest`, as it is; argparse names what is none."""
    if not re.fullmatch(rf"3\.\d+:({OLDEST}|{NEWEST})", text):
        raise argparse.ArgumentTypeError(f"{text} is not like 3.11:{OLDEST} or 3.12:{NEWEST}")
    return text


def check(python: str, packages: str, pins: Sequence[str], folder: Path) -> Row:
    """Make an environment and run the default tests in it.

    Args:
        python: the version of Python, such as `3.11`.
        packages: OLDEST or NEWEST.
        pins: requirements that come before the lower bounds.
        folder: of the environment and its logs; what is there is removed.
    """
    executable = find_python(python)
    if executable is None:
        return Row(python, packages, NOT_RUN, f"there is no Python {python} here", {})

    # A new environment, with this checkout in it.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bounds = list(pins)
    if packages == OLDEST:
        bounds = with_pins(lower_bounds(read_project()), pins)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(bounds) + "\n")
    environment = folder / "environment"
    subprocess.run([executable, "-m", "venv", environment], check=True)
    own_python = environment / "bin" / "python"
    install = [own_python, "-m", "pip", "install", "--disable-pip-version-check"]
    status, said = _run([*install, "-c", constraints, "-e", ".[dev]"], folder / "pip.log")
    if status:
        note = f"{_last_line(said, 'ERROR')} ({folder / 'pip.log'})"
        return Row(python, packages, FAILED, note, {})

    # The tests.
    start = time.monotonic()
    status, said = _run([own_python, "-m", "pytest"], folder / "tests.log")
    minutes = (time.monotonic() - start) / 60
    note = f"{_last_line(said, '')} ({minutes:.0f} min)"
    versions = installed(own_python)
    return Row(python, packages, FAILED if status else PASSED, note, versions)


def find_python(version: str) -> str | None:
    """The Python of a version, such as `3.11`: on the path, or of pyenv. None: there is none."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [str(path) for path in sorted(root.glob(f"versions/{version}.*/bin/python"))]
    on_path = shutil.which(f"python{version}")
    if on_path:
        candidates.append(on_path)
    for candidate in candidates:
        # Debian's Python alone cannot make environments, and a shim of pyenv may be empty.
        can_install = subprocess.run([candidate, "-c", "import ensurepip"], capture_output=True)
        if can_install.returncode == 0:
            return candidate
    return None


def read_project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    return project


def lower_bounds(project: Mapping[str, Any]) -> list[str]:
    """The oldest version that each requirement of the project and of its tests allows.

    Args:
        project: the table `project` of pyproject.toml.

    Returns:
        Requirements such as `torch==2.11`.

    Raises:
        ValueError: for a requirement without a lower bound.
    """
    requirements = [*project["dependencies"]]
    waiting = ["dev"]
    while waiting:
        for requirement in project["optional-dependencies"][waiting.pop()]:
            extra = re.fullmatch(rf"{project['name']}\[(\w+)\]", requirement)
            if extra:
                waiting.append(extra[1])
            else:
                requirements.append(requirement)
    bounds = []
    for requirement in requirements:
        found = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement} says no lower bound: write package>=version")
        bounds.append(f"{found[1]}=={found[2]}")
    return bounds


def with_pins(bounds: Sequence[str], pins: Sequence[str]) -> list[str]:
    """Requirements such as `torch==2.11`, where those of `pins` take the place of their package's.

    Args:
        bounds: a requirement a package.
        pins: what comes before them.
    """
    pinned = {pin.partition("==")[0] for pin in pins}
    return [*pins, *(bound for bound in bounds if bound.partition("==")[0] not in pinned)]


def installed(python: Path) -> dict[str, str]:
    """The versions of what an environment holds, by name.

    Args:
        python: the environment's Python.
    """
    command = [str(python), "-m", "pip", "list", "--format", "freeze"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = [line.partition("==") for line in listed.splitlines()]
    return {name: version for name, _, version in pairs}


def _run(command: Sequence[str | Path], log: Path) -> tuple[int, str]:
    """Run a command in the checkout; returns its exit status and what it said, kept in a file."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    with open(log, "w") as file:
        ended = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return ended.returncode, log.read_text(errors="replace")


def _last_line(text: str, start: str) -> str:
    """The last line of a text that is not empty and begins so; cut where it is long."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(start)]
    full = [line for line in lines if line]
    return full[-1][:200] if full else "it said nothing"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    head = ("Python", "packages", *SHOWN, "tests")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        versions = [row.versions.get(name, "") for name in SHOWN]
        cells = (row.python, row.packages, *versions, f"{row.status}: {row.note}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
