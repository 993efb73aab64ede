"""Parquet read where it is: the rows of a table on disk, and each row group read once an epoch."""

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deradiff.data import stream
from deradiff.data.pairs import Examples, Pairs
from deradiff.data.sources import parquet_files
from deradiff.data.stream import ParquetStream
from tests.support.tables import grey_value, png

SECOND_SHARD = "data/train-00001-of-00003.parquet"


def write_shard(path, first, count, group, **changes):
    """Rows number `first` on; every fifth is a tie, every seventh has no label.

    Image 0 has the row's number as its value, and is the winner of odd rows.
    """
    rows = range(first, first + count)
    columns = {
        "jpg_0": [png(row) for row in rows],
        "jpg_1": [png(255 - row) for row in rows],
        "label_0": [0.5 if row % 5 == 0 else float(row % 2) for row in rows],
        "caption": [str(row) for row in rows],
        "has_label": [row % 7 != 0 for row in rows],
    }
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns | changes), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path):
    """As downloaded from the hub: three shards of the training split, and one of the test split."""
    for shard in range(3):
        path = tmp_path / f"data/train-{shard:05d}-of-00003.parquet"
        write_shard(path, 20 * shard, 20, group=8)
    write_shard(tmp_path / "data/test-00000-of-00001.parquet", 100, 10, group=10)
    return tmp_path


def images_are_equal(first, second):
    """Whether two lists of images hold the same pixels."""
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, second))


def test_a_stream_holds_the_rows_of_the_table(folder):
    table = Pairs(str(folder))
    streamed = Pairs(str(folder), streaming=True)
    assert len(streamed.table) == 60
    assert table.captions == streamed.captions
    assert (table.rows == streamed.rows).all()
    assert (table.ties, table.missing_labels) == (10, 9)
    assert (streamed.ties, streamed.missing_labels) == (10, 9)
    for index in (0, 25, len(table) - 1, 3):
        assert images_are_equal(table.images(index), streamed.images(index))
        winner = grey_value(streamed.images(index)[0])
        row = int(streamed.captions[index])
        assert winner == (row if row % 2 else 255 - row)


def test_a_split_is_read_alone_and_a_missing_one_is_refused(folder):
    labelled = [str(row) for row in range(101, 110) if row % 5 and row % 7]
    assert Pairs(str(folder), split="test").captions == labelled
    message = r"split=dev is not in .*, which has train, test: give one of these"
    with pytest.raises(ValueError, match=message):
        Pairs(str(folder), split="dev")


def test_an_epoch_of_a_stream_reads_every_row_group_once(folder, monkeypatch):
    groups = []
    read_group = ParquetStream._read_group

    def recorded(self, group):
        groups.append(group)
        return read_group(self, group)

    monkeypatch.setattr(ParquetStream, "_read_group", recorded)
    pairs = Pairs(str(folder), streaming=True)
    examples = Examples(pairs, seed=1, in_blocks=True)

    # Each epoch has an order of its own
    orders = [[], [], []]
    for epoch, index in examples.epoch_indices(0, 3 * len(pairs)):
        orders[epoch].append(index)
    for order in orders:
        assert sorted(order) == list(range(len(pairs)))
    assert orders[0] != orders[1] != orders[2]

    # One of them, read
    for index in orders[0]:
        pairs.images(index)
    assert sorted(groups) == list(range(9))
    assert groups != sorted(groups)
    shards = pairs.blocks[0][orders[0]]
    assert len({tuple(shards[k : k + 2]) for k in range(0, 6, 2)}) == 1, "shard by shard"
    assert orders[0][:5] != sorted(orders[0][:5]), "in random order within a group"


def test_the_order_of_a_table_in_memory_is_not_in_blocks(folder):
    streamed = Examples(Pairs(str(folder), streaming=True), seed=1)
    table = Examples(Pairs(str(folder), streaming=False), seed=1)
    assert streamed.epoch_indices(0, 50) == table.epoch_indices(0, 50)


def test_the_fingerprint_of_a_stream_changes_with_its_files(folder):
    def fingerprint():
        return ParquetStream(parquet_files(str(folder), "train")).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    write_shard(folder / SECOND_SHARD, 21, 20, group=8)
    assert fingerprint() != before


def test_a_shard_with_other_columns_is_refused(folder):
    write_shard(folder / SECOND_SHARD, 21, 20, group=8, extra=[0] * 20)
    with pytest.raises(ValueError, match=r"train-00001.* has the columns .*extra"):
        ParquetStream(parquet_files(str(folder), "train"))


def test_a_data_set_of_the_hub_is_streamed_by_its_addresses(folder, monkeypatch):
    """fsspec's memory file system is the hub: addresses of a split, footers, row groups."""
    memory = fsspec.filesystem("memory")
    addresses = []
    for file in sorted(folder.glob("data/train-*")):
        memory.pipe(f"/pickapic/{file.name}", file.read_bytes())
        addresses.append(f"memory://pickapic/{file.name}")
    expected = Pairs(str(folder))

    class Builder:
        name = "parquet"
        config = type("Config", (), {"data_files": {"train": addresses, "test": []}})

    asked = []

    def load_dataset_builder(path, revision):
        asked.append((path, revision))
        return Builder()

    monkeypatch.setattr("deradiff.data.sources.datasets.load_dataset_builder", load_dataset_builder)
    pairs = Pairs("org/pickapic", revision="abc", streaming=True)
    assert asked == [("org/pickapic", "abc")]
    assert pairs.captions == expected.captions
    last = len(pairs) - 1
    assert images_are_equal(pairs.images(last), expected.images(last))


def test_what_is_not_parquet_cannot_be_streamed(tmp_path):
    (tmp_path / "0.png").write_bytes(png(1))
    with pytest.raises(ValueError, match=r"is not parquet: give streaming=False"):
        Pairs(str(tmp_path), streaming=True)


def test_only_the_latest_row_groups_are_kept_in_memory(folder):
    pairs = Pairs(str(folder), streaming=True)
    for index in range(len(pairs)):
        pairs.images(index)
    assert len(pairs.table._groups_in_memory) == stream.GROUPS_IN_MEMORY
