"""People's votes, and the scorers beside them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deradiff.evaluation.votes import read_votes
from deradiff.image_tables import write_pair_table
from deradiff.worlds.shapes import held_out_captions
from eval.config import EvalConfig, ScorerConfig
from tests.support.sampled_runs import evaluate, write_run

GREY, RED, PURE = (0, 128, 255)
"""How colourful an image is."""


def png(saturation: int) -> bytes:
    """An image of one colour, from grey to red."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255 - saturation, 255 - saturation)).save(buffer, "PNG")
    return buffer.getvalue()


def write_votes(folder: Path, votes: list[tuple], **more) -> str:
    """Votes (colour of the first image, of the second, label, caption) as a parquet file."""
    first, second, label, captions = (list(column) for column in zip(*votes))
    path = folder / "votes.parquet"
    write_pair_table(path, list(map(png, first)), list(map(png, second)), label, captions, **more)
    return str(path)


VOTES = [
    (PURE, GREY, 1.0, "a"),  # the more colourful one was preferred
    (GREY, PURE, 0.0, "a"),
    (PURE, GREY, 0.0, "b"),  # the other one
    (PURE, GREY, 0.5, "c"),  # a tie of people
    (RED, RED, 1.0, "d"),  # a tie of the scorer
]


def test_votes_are_read_as_they_are(tmp_path):
    votes = read_votes(write_votes(tmp_path, VOTES))
    assert votes.table["label"].tolist() == [1, 0, 0, 0.5, 1]
    assert votes.table["prompt"].tolist() == ["a", "a", "b", "c", "d"]
    images = votes.images()
    assert len(images) == 10 and images["sha256"].nunique() == 3
    first = images.query("row == 1 and side == 0")["file"].item()
    assert np.asarray(votes.image(first))[0, 0].tolist() == [255, 255, 255]
    assert first.endswith("votes.parquet: jpg_0 of row 1")


def test_rows_without_a_label_are_left_out(tmp_path):
    path = write_votes(tmp_path, VOTES, has_label=[True, True, False, True, True])
    assert read_votes(path).table["row"].tolist() == [0, 1, 3, 4]
    unlabelled = [(PURE, GREY, 1.0, "a"), (PURE, GREY, float("nan"), "a")]
    assert read_votes(write_votes(tmp_path, unlabelled)).table["row"].tolist() == [0]


def test_images_may_be_records_of_datasets(tmp_path):
    record = pa.array([{"bytes": png(RED), "path": "x.png"}])
    columns = {"jpg_0": record, "jpg_1": record, "label_0": [0.5], "caption": ["a"]}
    pq.write_table(pa.table(columns), tmp_path / "votes.parquet")
    assert len(read_votes(tmp_path / "votes.parquet").table) == 1


def written(folder, **columns):
    """A table that holds one vote, and other values in the columns that are given."""
    usual = {"jpg_0": [png(RED)], "jpg_1": [png(RED)], "label_0": [1.0], "caption": ["a"]}
    path = folder / "votes.parquet"
    chosen = {name: values for name, values in (usual | columns).items() if values is not None}
    pq.write_table(pa.table(chosen), path)
    return path


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"jpg_1": None, "caption": None}, "lacks the column jpg_1, caption: give votes in the"),
        ({"label_0": [0.7]}, "row 0 has label_0 0.7 and caption 'a'"),
        ({"label_0": ["left"]}, "row 0 has label_0 'left'"),
        ({"caption": [" "]}, "row 0 has label_0 1.0 and caption ' '"),
        ({"label_0": [float("nan")]}, "holds no vote"),
        ({"jpg_0": [b"torn"]}, "jpg_0 of row 0 is no image that can be read"),
        ({"jpg_1": ["/etc/passwd"]}, "jpg_1 of row 0 is no image: the cell names '/etc/passwd'"),
    ],
)
def test_what_is_no_vote_is_refused(tmp_path, columns, words):
    with pytest.raises(ValueError, match=words) as refused:
        read_votes(written(tmp_path, **columns))
    assert "\n" not in str(refused.value)


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "votes.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="is no parquet file that can be read"):
        read_votes(tmp_path / "votes.parquet")


def agreement(run_dir):
    """The table's rows with people, by scorer."""
    table = pd.read_csv(run_dir / "tables" / "scorer_agreement.csv")
    return table[table["other"] == "people"].set_index("scorer")


def test_each_scorer_is_held_against_people(tmp_path):
    """On prompt a it agrees twice, on b not at all, on c and d there is a tie: half."""
    path = write_votes(tmp_path, VOTES)
    samples = [write_run(tmp_path, 2000, prompts=3)]
    run_dir = evaluate(tmp_path, samples, "colourful", votes=path)
    row = agreement(run_dir).loc["colourful"]
    assert (row["pairs"], row["prompts"], row["on"]) == (5, 4, "votes")
    assert row["same"] == pytest.approx(100 * (1 + 0 + 0.5 + 0.5) / 4)
    assert row["same_low"] < row["same"] < row["same_high"]
    note = (run_dir / "tables" / "scorer_agreement.md").read_text()
    assert "on 5 of their votes, of which 1 are ties, so that no scorer comes above 87.5 %" in note

    written = pd.read_parquet(run_dir / "votes.parquet")
    assert written["preference"].tolist() == [1, 0, 1, 1, 0.5]

    # Without votes the same run has neither the rows nor the file
    assert evaluate(tmp_path, samples, "colourful") == run_dir
    assert not (run_dir / "votes.parquet").exists()
    assert not (run_dir / "tables" / "scorer_agreement.csv").exists()


def test_a_prompt_that_a_scorer_cannot_judge_by_is_refused_before_an_image_is_scored(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "deradiff.evaluation.scoring.load_spec", lambda *a, **k: pytest.fail("loaded")
    )
    with pytest.raises(ValueError, match="vivid judges by captions of the shapes world"):
        path = write_votes(tmp_path, VOTES)
        evaluate(tmp_path, [write_run(tmp_path, 2000)], "colourful", "vivid", votes=path)


def test_captions_of_the_shapes_world_serve_its_rewards(tmp_path):
    captions = held_out_captions()[:4]
    votes = [(PURE, GREY, 1.0, caption) for caption in captions]
    run_dir = evaluate(
        tmp_path, [write_run(tmp_path, 2000, prompts=2)], votes=write_votes(tmp_path, votes)
    )
    assert agreement(run_dir).loc["vivid", "pairs"] == 4


def test_a_file_that_is_not_there_is_looked_for(tmp_path):
    samples = [write_run(tmp_path, 2000)]
    config = EvalConfig(samples, scorers={"vivid": ScorerConfig()}, votes="gone.parquet")
    with pytest.raises(ValueError, match=r"votes=gone.parquet is not there"):
        config.check_paths()
