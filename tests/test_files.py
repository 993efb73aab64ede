"""Names that are safe, and files that are whole or not there."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from deradiff.files import append_line, slug, write_atomic, writing


def test_names_are_safe_and_different_texts_have_different_names():
    assert slug("lora-beta=500_1.0") == "lora-beta=500_1.0"
    names = {slug(text) for text in ("a/b", "a b", "a:b", "a-b", "..", "", "/")}
    assert len(names) == 7
    assert all("/" not in name and not name.startswith(".") for name in names)
    assert len(slug("x" * 500)) < 100


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file.txt"
    write_atomic(file, "old")

    def no_space(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(file, b"a longer text")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file], "nothing is left aside"


def test_a_disk_without_room_is_named_with_the_file(tmp_path):
    file = tmp_path / "a.bin"
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("No space left\non device (os error 28)"),
        RuntimeError("No space left on device: unexpected pos"),
    ):
        message = r"a.bin cannot be written \(No space left on device.*\): make room"
        with pytest.raises(OSError, match=message), writing(file):
            raise error


def test_a_line_stands_alone_also_behind_a_torn_one(tmp_path):
    file = tmp_path / "lines.jsonl"
    append_line(file, "1")
    append_line(file, "2")
    file.write_bytes(file.read_bytes() + b'{"torn')
    append_line(file, "3")
    assert file.read_text() == '1\n2\n{"torn\n3\n'
