"""Tables of every kind, opened: what is read, and what is refused by name."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value

from deradiff.data import sources
from deradiff.data.pairs import BrokenImage, CaptionedImages, Pairs
from tests.support.tables import grey_value, png

both_readers = pytest.mark.parametrize("streaming", [False, True])


def write_images(folder, captions=("dark", "light")):
    """A folder of images, each of another grey."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        (folder / f"{i}.png").write_bytes(png(50 * i))
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_pairs(file, rows=2, **columns):
    """Pairs in a parquet file, with columns in the place of the usual ones."""
    table = {
        "jpg_0": [png(row) for row in range(rows)],
        "jpg_1": [png(100 + row) for row in range(rows)],
        "label_0": [1.0] * rows,
        "caption": [f"caption {row}" for row in range(rows)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), file)
    return str(file)


def test_a_folder_of_captioned_images(tmp_path):
    images = CaptionedImages(str(write_images(tmp_path)))
    assert sorted(images.captions) == ["dark", "light"]
    (light,) = images.images(images.captions.index("light"))
    assert np.asarray(light).max() == 50


@both_readers
def test_labels_turned_round_under_the_same_size_and_time_are_noticed(tmp_path, streaming):
    path = write_pairs(tmp_path / "a.parquet", label_0=[1.0, 0.0], caption=["a", None])
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    size = os.stat(path).st_size
    first = Pairs(path, streaming=streaming)
    write_pairs(tmp_path / "a.parquet", label_0=[0.0, 1.0], caption=["a", None])
    os.utime(path, ns=times)
    assert os.stat(path).st_size == size
    second = Pairs(path, streaming=streaming)
    assert first.fingerprint != second.fingerprint
    assert [grey_value(pairs.images(0)[0]) for pairs in (first, second)] == [0, 100]


@pytest.mark.parametrize("name", ["[v2] pairs", "a*b", "a?b", "{a,b}"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path, name):
    write_pairs(tmp_path / name / "train-0[1].parquet")
    write_pairs(tmp_path / "aXb" / "train-0.parquet", rows=5)
    for streaming in (False, True):
        pairs = Pairs(str(tmp_path / name), streaming=streaming)
        assert (len(pairs), grey_value(pairs.images(1)[0])) == (2, 1)
    images = CaptionedImages(str(write_images(tmp_path / "images" / name)))
    assert len(images) == 2


@pytest.mark.parametrize("linked", [False, True])
def test_an_image_outside_of_the_folder_is_not_read(tmp_path, linked):
    private = tmp_path / "private.png"
    private.write_bytes(png(9))
    folder = write_images(tmp_path / "images")
    if linked:
        (folder / "0.png").unlink()
        (folder / "0.png").symlink_to(private)
        images = CaptionedImages(str(folder))
        index = images.captions.index("dark")
        with pytest.raises(BrokenImage, match="no file that a table names is read"):
            images.images(index)
    else:
        line = json.dumps({"file_name": "../private.png", "caption": "a"})
        (folder / "metadata.jsonl").write_text(line)
        with pytest.raises(ValueError, match="images"):
            CaptionedImages(str(folder)).images(0)


@both_readers
@pytest.mark.parametrize("in_record", [False, True])
def test_a_file_that_a_table_names_is_not_read(tmp_path, streaming, in_record):
    private = tmp_path / "private.png"
    private.write_bytes(png(9))
    cells = [{"bytes": None, "path": str(private)}] if in_record else [str(private)]
    path = write_pairs(tmp_path / "pairs.parquet", rows=1, jpg_1=cells)
    pairs = Pairs(path, streaming=streaming)
    with pytest.raises(BrokenImage, match=r"jpg_1 of row 0 .*private.*write the bytes"):
        pairs.images(0)


@both_readers
def test_datasets_decodes_no_image_itself(tmp_path, streaming, monkeypatch):
    """Whatever the table's own header says its cells are: datasets opens every format."""

    def decode(*args, **options):
        raise AssertionError("datasets decoded an image")

    features = Features(
        {
            "jpg_0": List(Image()),
            "jpg_1": Image(),
            "label_0": Value("float32"),
            "caption": Value("string"),
            "more": Image(),
        }
    )
    record = {"bytes": png(1), "path": None}
    row = {"jpg_0": [record], "jpg_1": record, "label_0": 1, "caption": "a", "more": record}
    file = tmp_path / "pairs.parquet"
    Dataset.from_list([row], features=features).to_parquet(file)
    monkeypatch.setattr(Image, "decode_example", decode)
    pairs = Pairs(str(file), streaming=streaming)
    with pytest.raises(BrokenImage, match=r"jpg_0 of row 0 .*list of 1"):
        pairs.images(0)


@both_readers
@pytest.mark.parametrize(
    "cells",
    [
        [png(0), None],
        pa.array([{"bytes": png(0)}, {"bytes": None}], pa.struct([("bytes", pa.binary())])),
        [{"bytes": png(0), "path": None}, {"bytes": None, "path": None}],
    ],
    ids=["null", "bytes alone", "both null"],
)
def test_a_cell_without_an_image_is_a_broken_image(tmp_path, streaming, cells):
    path = write_pairs(tmp_path / "pairs.parquet", jpg_0=cells)
    pairs = Pairs(path, streaming=streaming)
    assert grey_value(pairs.images(0)[0]) == 0
    with pytest.raises(BrokenImage, match=r"jpg_0 of row 1 .*the cell is empty"):
        pairs.images(1)


@both_readers
def test_bytes_in_lists_are_images(tmp_path, streaming):
    cells = pa.array([list(png(3)), list(png(4))], pa.list_(pa.uint8()))
    pairs = Pairs(write_pairs(tmp_path / "pairs.parquet", jpg_0=cells), streaming=streaming)
    assert grey_value(pairs.images(1)[0]) == 4


@both_readers
def test_a_shard_without_rows_is_passed_over(tmp_path, streaming):
    write_pairs(tmp_path / "train-0.parquet")
    pq.write_table(pa.table({}), tmp_path / "train-1.parquet")
    none = pq.read_table(tmp_path / "train-0.parquet").slice(0, 0)
    pq.write_table(none, tmp_path / "train-2.parquet")
    assert len(Pairs(str(tmp_path), streaming=streaming)) == 2


@both_readers
def test_a_table_without_rows_is_refused(tmp_path, streaming):
    write_pairs(tmp_path / "train-0.parquet")
    none = pq.read_table(tmp_path / "train-0.parquet").slice(0, 0)
    pq.write_table(none, tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match="has no row"):
        Pairs(str(tmp_path), streaming=streaming)


@both_readers
def test_two_columns_of_one_name_are_refused(tmp_path, streaming):
    file = tmp_path / "pairs.parquet"
    write_pairs(file)
    table = pq.read_table(file)
    pq.write_table(table.append_column("caption", pa.array(["x", "y"])), file)
    with pytest.raises(ValueError, match=r"pairs.parquet has two columns caption: give one of"):
        Pairs(str(file), streaming=streaming)


@both_readers
def test_a_shard_of_another_table_is_named(tmp_path, streaming):
    write_pairs(tmp_path / "train-0.parquet")
    write_pairs(tmp_path / "train-1.parquet", extra=[1, 2])
    with pytest.raises(ValueError, match=r"train-1\.parquet has the columns .*extra"):
        Pairs(str(tmp_path), streaming=streaming)


@both_readers
@pytest.mark.parametrize("content", [b"", b"PAR1 is no table PAR1", b"version https://git-lfs"])
def test_a_file_that_is_no_parquet_is_named(tmp_path, streaming, content):
    file = tmp_path / "pairs.parquet"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.parquet"):
        Pairs(str(file), streaming=streaming)


@both_readers
def test_columns_of_other_types_in_a_shard(tmp_path, streaming):
    """Read where each is read for itself, refused by the table's name where they are joined."""
    write_pairs(tmp_path / "train-0.parquet")
    write_pairs(tmp_path / "train-1.parquet", caption=[["a"], ["b"]])
    with pytest.raises(ValueError, match=Path(tmp_path).name):
        Pairs(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize(
    "captions", [[["a", "b"]] * 2, [1, 2], [b"a", b"b"], [{"en": "a"}] * 2, [1.5, None]]
)
def test_captions_that_are_no_texts_are_refused(tmp_path, captions):
    path = write_pairs(tmp_path / "pairs.parquet", caption=captions)
    with pytest.raises(ValueError, match=r"pairs\.parquet: caption of row 0 is a .*give"):
        Pairs(path, streaming=True)


def test_captions_that_are_no_utf_8_are_refused(tmp_path):
    torn = pa.array([b"a", b"\xff\xfe"]).view(pa.string())
    path = write_pairs(tmp_path / "pairs.parquet", caption=torn)
    with pytest.raises(ValueError, match=r"pairs\.parquet: caption holds text that is no UTF-8"):
        Pairs(path, streaming=True)


@pytest.mark.parametrize(
    ("labels", "named"),
    [([1, -1], "-1"), ([1, 2], "2"), ([0.7, 0.3], "0.3"), (["1", "0"], "'1'"), ([[1], [0]], "1")],
)
def test_labels_that_mean_something_else_are_refused(tmp_path, labels, named):
    path = write_pairs(tmp_path / "pairs.parquet", label_0=labels)
    with pytest.raises(ValueError, match=rf"label_0 of row .*{named}.*: give 1 where the first"):
        Pairs(path, streaming=True)


@pytest.mark.parametrize("labels", [[True, False], [1, 0], [1.0, 0.0]])
def test_labels_of_any_type_of_number_are_read(tmp_path, labels):
    pairs = Pairs(write_pairs(tmp_path / "pairs.parquet", label_0=labels), streaming=True)
    assert [grey_value(pairs.images(i)[0]) for i in (0, 1)] == [0, 101]


def test_a_label_that_is_none_may_be_anything(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", label_0=[1, -1], has_label=[1, 0])
    pairs = Pairs(path, streaming=True)
    assert (len(pairs), pairs.missing_labels) == (1, 1)


def test_words_in_has_label_are_refused(tmp_path):
    path = write_pairs(tmp_path / "pairs.parquet", has_label=["true", "false"])
    with pytest.raises(ValueError, match=r"has_label of row 0 is 'true'.*give true or false"):
        Pairs(path, streaming=True)


@pytest.mark.parametrize(
    "address", ["/etc/a.parquet", "file:///etc/a.parquet", "zip://a.parquet::/etc/a.zip"]
)
def test_a_data_set_of_the_hub_names_no_file_of_this_machine(monkeypatch, address):
    class Builder:
        name = "parquet"
        config = type("Config", (), {"data_files": {"train": [address]}})

    monkeypatch.setattr(sources.datasets, "load_dataset_builder", lambda path, revision: Builder())
    with pytest.raises(ValueError, match="names a file of this machine"):
        Pairs("org/name", streaming=True)
