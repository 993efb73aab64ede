"""Many rows written as numbered files, by all processes together.

A part is written completely or not at all, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.digests import is_as_written
from deradiff.locks import Locks
from deradiff.progress import progress_bar

Advance = Callable[[int], Any]
"""Tells the progress bar how many more rows are done."""

Write = Callable[[range, Path, Advance], None]
"""Writes the rows of a range into a file."""


@dataclass(frozen=True)
class PartFiles:
    """The parts of one table.

    Attributes:
        lock: the file by which processes share the work.
        file_of: the file of a part, from its number.
        rows: of all parts together.
        size: rows of a part; the last one may have fewer.
    """

    lock: Path
    file_of: Callable[[int], Path]
    rows: int
    size: int

    @property
    def numbers(self) -> range:
        """The numbers of all parts."""
        return range(math.ceil(self.rows / self.size))

    def write_missing(
        self,
        write: Write,
        description: str,
        *,
        unit: str = "row",
        progress: bool = True,
        is_complete: Callable[[Path], bool] = is_as_written,
    ) -> None:
        """Write the parts that are missing; return when all are there, whoever wrote them.

        Args:
            write: writes the rows of a range into a file, and tells how many it has done.
            description: for the progress bar.
            unit: what a row is, for the progress bar.
            progress: show a progress bar, if there is something to write.
            is_complete: whether a part is there.
        """
        missing = [number for number in self.numbers if not is_complete(self.file_of(number))]
        count = sum(len(self._rows_of(number)) for number in missing)
        bar = progress_bar(count, description, unit, is_shown=progress and count > 0, leave=False)
        with Locks(self.lock) as locks, bar:
            for number in locks.share(missing):
                file = self.file_of(number)
                rows = self._rows_of(number)
                # Another process may have written it meanwhile.
                if file.is_file():
                    bar.update(len(rows))
                else:
                    # Nobody else writes it now: what is aside was left by a kill.
                    for left in file.parent.glob(f".{file.name}.*.part"):
                        left.unlink(missing_ok=True)
                    write(rows, file, bar.update)

    def _rows_of(self, number: int) -> range:
        """The rows of a part."""
        start = number * self.size
        return range(start, min(start + self.size, self.rows))
