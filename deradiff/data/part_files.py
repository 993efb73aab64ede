"""Many rows written as numbered files, by all processes together.

A part is written completely or not at all, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from deradiff.data.locks import Locks


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
        write: Callable[[range, Path], None],
        description: str,
        *,
        unit: str = "part",
        progress: bool = True,
        is_complete: Callable[[Path], bool] = Path.is_file,
    ) -> None:
        """Write the parts that are missing; return when all are there, whoever wrote them.

        Args:
            write: writes the rows of a range into a file.
            description: for the progress bar.
            unit: what the progress bar counts.
            progress: show a progress bar, if there is something to write.
            is_complete: whether a part is there.
        """
        missing = [number for number in self.numbers if not is_complete(self.file_of(number))]
        bar = tqdm(
            total=len(missing),
            desc=description,
            unit=unit,
            disable=not (progress and missing),
            leave=False,
        )
        with Locks(self.lock) as locks, bar:
            for number in locks.share(missing):
                file = self.file_of(number)
                # Another process may have written it meanwhile.
                if not file.is_file():
                    start = number * self.size
                    write(range(start, min(start + self.size, self.rows)), file)
                bar.update()
