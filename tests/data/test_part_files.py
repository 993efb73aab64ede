"""Rows in numbered files: which rows a part holds, and which parts are written."""

import pytest

from deradiff.data.part_files import PartFiles


@pytest.fixture
def parts(tmp_path):
    """Ten rows in parts of four."""
    return PartFiles(tmp_path / ".lock", lambda number: tmp_path / f"{number}.txt", 10, 4)


def write_rows(rows, file, advance):
    file.write_text(" ".join(str(row) for row in rows))
    advance(len(rows))


def test_every_row_is_in_one_part_and_the_last_part_may_be_short(parts):
    parts.write_missing(write_rows, "writing", progress=False)
    texts = [parts.file_of(number).read_text() for number in parts.numbers]
    assert texts == ["0 1 2 3", "4 5 6 7", "8 9"]


def test_parts_that_are_there_are_kept(parts):
    parts.file_of(1).write_text("there")
    written = []

    def write(rows, file, advance):
        written.append(file.name)
        write_rows(rows, file, advance)

    parts.write_missing(write, "writing", progress=False)
    assert written == ["0.txt", "2.txt"]
    assert parts.file_of(1).read_text() == "there"


def test_a_part_that_another_process_has_written_meanwhile_is_not_written_again(parts):
    written = []

    def write(rows, file, advance):
        written.append(file.name)
        for number in parts.numbers:
            write_rows(rows, parts.file_of(number), advance)

    parts.write_missing(write, "writing", progress=False)
    assert written == ["0.txt"]


def test_the_bar_counts_rows_and_not_parts(parts, capsys):
    parts.file_of(1).write_text("there")
    parts.write_missing(write_rows, "writing", unit="caption")
    assert "6/6" in capsys.readouterr().err
