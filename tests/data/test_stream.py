"""Parquet read where it lies: the rows of a table on disk, in an order that reads each row group once; and work shared by processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deradiff.data import stream
from deradiff.data.locks import Locks
from deradiff.data.pairs import Examples, Pairs
from deradiff.data.sources import parquet_files
from deradiff.data.stream import ParquetStream
from tests.data.test_data import png


def write_shard(path, first, count, group, **changes):
    """Rows number `first` on: image 0 has their number's colour, every fifth is a tie, every seventh unlabelled."""
    rows = range(first, first + count)
    columns = {
        "jpg_0": [png(i) for i in rows],
        "jpg_1": [png(255 - i) for i in rows],
        "label_0": [0.5 if i % 5 == 0 else float(i % 2) for i in rows],
        "caption": [str(i) for i in rows],
        "has_label": [i % 7 != 0 for i in rows],
    }
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns | changes), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path):
    """As a data set is downloaded from the hub: three shards of the training split, and one of the test split."""
    for shard in range(3):
        write_shard(
            tmp_path / "data" / f"train-{shard:05d}-of-00003.parquet", 20 * shard, 20, group=8
        )
    write_shard(tmp_path / "data" / "test-00000-of-00001.parquet", 100, 10, group=10)
    return str(tmp_path)


def test_a_stream_holds_the_rows_of_the_table(folder):
    table, streamed = Pairs(folder), Pairs(folder, streaming=True)
    assert (
        table.captions == streamed.captions
        and (table.rows == streamed.rows).all()
        and len(streamed.table) == 60
    )
    assert (table.ties, table.unlabelled) == (streamed.ties, streamed.unlabelled) == (10, 9)
    for i in (0, 25, len(table) - 1, 3):
        for a, b in zip(table.pictures(i), streamed.pictures(i)):
            assert (np.asarray(a) == np.asarray(b)).all()
        winner = int(np.asarray(streamed.pictures(i)[0])[0, 0, 0])
        row = int(streamed.captions[i])
        assert winner == (row if row % 2 else 255 - row)


def test_a_split_is_read_alone_and_a_missing_one_is_told(folder):
    assert Pairs(folder, split="test").captions == [
        str(i) for i in range(101, 110) if i % 5 and i % 7
    ]
    with pytest.raises(
        ValueError, match=r"has no split dev; it has train, test: give data\.split="
    ):
        Pairs(folder, split="dev")


def test_an_epoch_of_a_stream_reads_every_row_group_once(folder, monkeypatch):
    pairs, read = Pairs(folder, streaming=True), []
    whole = ParquetStream._read_group
    monkeypatch.setattr(
        ParquetStream,
        "_read_group",
        lambda self, group: (read.append(group), whole(self, group))[1],
    )
    examples = Examples(pairs, seed=1, in_blocks=True)
    orders = [
        [i for e, i in examples.places(0, 3 * len(pairs)) if e == epoch] for epoch in range(3)
    ]
    assert (
        all(sorted(order) == list(range(len(pairs))) for order in orders)
        and orders[0] != orders[1] != orders[2]
    )
    for i in orders[0]:
        pairs.pictures(i)
    assert sorted(read) == list(range(9)) and read != sorted(read)
    assert len({tuple(pairs.blocks[0][orders[0]][k : k + 2]) for k in range(0, 6, 2)}) == 1, (
        "shard by shard"
    )
    assert orders[0][:5] != sorted(orders[0][:5]), "in random order within a group"


def test_the_order_of_a_table_in_memory_is_not_in_blocks(folder):
    streamed, table = (Examples(Pairs(folder, streaming=s), seed=1) for s in (True, False))
    assert streamed.places(0, 50) == table.places(0, 50)


def test_a_stream_knows_when_its_files_changed(folder):
    before = ParquetStream(parquet_files(folder, "train")).fingerprint
    assert ParquetStream(parquet_files(folder, "train")).fingerprint == before
    write_shard(Path(folder) / "data" / "train-00001-of-00003.parquet", 21, 20, group=8)
    assert ParquetStream(parquet_files(folder, "train")).fingerprint != before
    write_shard(
        Path(folder) / "data" / "train-00001-of-00003.parquet", 21, 20, group=8, extra=[0] * 20
    )
    with pytest.raises(ValueError, match=r"train-00001.* has the columns .*extra"):
        ParquetStream(parquet_files(folder, "train"))


def test_a_data_set_of_the_hub_is_streamed_by_its_addresses(folder, monkeypatch):
    """The hub's part is played by fsspec's memory file system: the addresses of a split, its footers, its row groups."""
    import datasets
    import fsspec

    memory, addresses = fsspec.filesystem("memory"), []
    for file in sorted(Path(folder, "data").glob("train-*")):
        memory.pipe(f"/pickapic/{file.name}", file.read_bytes())
        addresses.append(f"memory://pickapic/{file.name}")
    asked, expected = [], Pairs(folder)

    class Builder:
        name = "parquet"
        config = type("Config", (), {"data_files": {"train": addresses, "test": []}})

    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda source, revision: (asked.append((source, revision)), Builder())[1],
    )
    pairs = Pairs("org/pickapic", revision="abc", streaming=True)
    assert asked == [("org/pickapic", "abc")] and pairs.captions == expected.captions
    i = len(pairs) - 1
    assert (np.asarray(pairs.pictures(i)[0]) == np.asarray(expected.pictures(i)[0])).all()


def test_what_is_not_parquet_cannot_be_streamed(tmp_path):
    (tmp_path / "0.png").write_bytes(png(1))
    with pytest.raises(
        ValueError, match=r"is not parquet, so it cannot be streamed: give data\.streaming=false"
    ):
        Pairs(str(tmp_path), streaming=True)


def test_only_what_is_needed_is_held_in_memory(folder):
    pairs = Pairs(folder, streaming=True)
    for i in range(len(pairs)):
        pairs.pictures(i)
    assert len(pairs.table.held) == stream.GROUPS


def test_processes_share_numbered_work_and_a_killed_one_leaves_no_lock(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from deradiff.data.locks import Locks
with Locks(Path({str(tmp_path / "lock")!r})) as locks:
    for number in locks.share([0, 1, 2]):
        print(number, flush=True)
        time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "0\n"  # it is at 0, and holds it
    with Locks(tmp_path / "lock") as locks:
        shared = locks.share([0, 1, 2])
        assert [next(shared), next(shared)] == [1, 2], "what nobody is at comes first"
        other.kill()
        assert list(shared) == [0]
    other.wait()
