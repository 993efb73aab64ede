"""The scores of all runs in one cache: nothing twice, several processes at once, torn lines, kills,
ranks that share the images."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from deradiff.evaluation import scoring, shared_work
from deradiff.evaluation.scoring import score_images, write_scores
from deradiff.scorers import cache
from deradiff.scorers.cache import ScoreCache, score_key
from deradiff.scorers.spec import ScorerSpec


class Level:
    """Scores an image by its grey level plus the length of its prompt, and counts what it scores.

    Attributes:
        seen: the level and prompt of each image that was scored.
    """

    name = "level"
    scale = "grey level"
    preprocessing = "none"

    def __init__(self, version: str = "1") -> None:
        self.version = version
        self.seen = []

    def __call__(self, images, prompts):
        scores = []
        for image, prompt in zip(images, prompts):
            level = level_of(image)
            self.seen.append((level, prompt))
            scores.append(level + len(prompt))
        return torch.tensor(scores, dtype=torch.float32)


def level_of(image: Image.Image) -> int:
    """The grey level of an image of one colour."""
    return image.getpixel((0, 0))[0]


def grey_samples(folder: Path, count: int = 12, prompt: str = "p{}") -> pd.DataFrame:
    """Samples of grey images, two of each."""
    rows = []
    for i in range(count):
        file = folder / f"{i}.png"
        Image.new("RGB", (3, 3), (i // 2,) * 3).save(file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        rows.append(
            {
                "run": f"run{i % 3}",
                "image": file.name,
                "file": str(file),
                "sha256": digest,
                "prompt": prompt.format(i // 2),
                "role": i,
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """`score_images` with one `Level` behind the name, as one of several ranks."""

    def score(samples, scorer, rank=0, ranks=1, batch_size=4, meeting=lambda: None):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=ranks,
            is_main_process=rank == 0,
            device="cpu",
            wait_for_everyone=meeting,
        )
        for module in (scoring, shared_work):
            monkeypatch.setattr(module, "process_state", lambda: state)
        monkeypatch.setattr(scoring, "load_spec", lambda *a, **k: scorer)
        specs = {"level": ScorerSpec(name="colourful")}
        return score_images(samples, specs, batch_size, tmp_path / "cache")

    return score


def test_every_image_has_its_row_and_nothing_is_scored_twice(tmp_path, scored):
    samples = grey_samples(tmp_path)
    scorer = Level()
    table = scored(samples, scorer)
    assert len(scorer.seen) == 6 and len(table) == 12  # two of each
    assert table["score"].tolist() == [i // 2 + 2 for i in range(12)]
    columns = {"run", "image", "role", "scorer", "version", "scale", "preprocessing"}
    assert columns <= set(table.columns) and "file" not in table

    # The same images again, in another order
    again = Level()
    backwards = scored(samples.iloc[::-1], again)
    assert backwards["score"].tolist() == table["score"].tolist()[::-1]
    assert not again.seen

    # A prompt is half of what a score depends on
    more = pd.concat([samples, samples.assign(prompt="another")])
    scored(more, again)
    assert len(again.seen) == 6 and {prompt for _, prompt in again.seen} == {"another"}


@pytest.mark.parametrize("changed", ["name", "version", "scale", "preprocessing"])
def test_a_scorer_that_is_another_has_other_scores(tmp_path, scored, changed):
    samples = grey_samples(tmp_path)
    scored(samples, Level())
    other = Level()
    setattr(other, changed, "2")
    scored(samples, other)
    assert len(other.seen) == 6


def test_a_correction_of_the_code_forgets_the_scores_of_before(tmp_path, scored, monkeypatch):
    samples = grey_samples(tmp_path)
    scored(samples, Level())
    monkeypatch.setattr(cache, "_source_digest", lambda: "corrected")
    again = Level()
    scored(samples, again)
    assert len(again.seen) == 6


def test_a_kill_costs_no_more_than_a_batch(tmp_path, scored):
    samples = grey_samples(tmp_path)
    killed = Level()

    class Killed(Level):
        def __call__(self, images, prompts):
            if len(killed.seen) >= 4:
                raise KeyboardInterrupt
            return killed(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        scored(samples, Killed())
    again = Level()
    assert len(scored(samples, again)) == 12
    assert len(killed.seen) == 4 and len(again.seen) == 2


def test_a_score_that_a_bit_has_changed_is_computed_again(tmp_path, scored):
    samples = grey_samples(tmp_path)
    scored(samples, Level())
    file = next((tmp_path / "cache").rglob("*.jsonl"))
    before = file.read_text()
    file.write_text(before.replace(", 3.0, ", ", 7.0, "))
    assert file.read_text() != before
    again = Level()
    table = scored(samples, again)
    assert table["score"].tolist() == [i // 2 + 2 for i in range(12)]
    assert len(again.seen) == 1


@pytest.mark.parametrize(
    "torn",
    [
        b'["a',
        b"\xff\xfe\n",
        b'{"a": 1}\n',
        b"[1, 2, 3]\n",
        b'["a", "b", NaN, 1]\n',
        b'["a", "b", 1.0]\n',
        b'["a", "b", "c"]\n',
        b"null\n",
        b"\n\n",
    ],
)
def test_a_line_that_is_not_whole_counts_as_not_there(tmp_path, scored, torn):
    samples = grey_samples(tmp_path)
    scored(samples, Level())
    file = next((tmp_path / "cache").rglob("*.jsonl"))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + torn)
    again = Level()
    table = scored(samples, again)
    assert table["score"].tolist() == [i // 2 + 2 for i in range(12)]
    assert len(again.seen) == 3


def test_prompts_may_be_any_text(tmp_path, scored):
    for prompt in ("<script>{}\u2028", "\U0001f98a{}", "x" * 10_000 + "{}", "../../{}", '"]\n{}'):
        scorer = Level()
        scored(grey_samples(tmp_path, prompt=prompt), scorer)
        assert len(scorer.seen) == 6
        again = Level()
        scored(grey_samples(tmp_path, prompt=prompt), again)
        assert not again.seen


def test_scores_come_back_to_the_last_bit(tmp_path):
    scores = np.random.default_rng(0).normal(0, 1e-3, 50).astype(np.float32)
    keys = [score_key(str(i), "p") for i in range(50)]
    ScoreCache(tmp_path, Level()).add(keys, [float(score) for score in scores])
    reopened = ScoreCache(tmp_path, Level())
    assert [np.float32(reopened.scores[key]) for key in keys] == list(scores)
    assert json.loads((reopened.folder / "scorer.json").read_text())["scale"] == "grey level"


def test_several_processes_add_at_once(tmp_path):
    caches = [ScoreCache(tmp_path, Level()) for _ in range(3)]
    for i in range(9):
        caches[i % 3].add([score_key(str(i), "p")], [i])
    caches[0].read()
    expected = {score_key(str(i), "p"): i for i in range(9)}
    assert caches[0].scores == ScoreCache(tmp_path, Level()).scores == expected


def test_ranks_share_the_images_and_the_main_one_has_them_all(tmp_path, scored):
    """Every rank reads the empty cache before any writes: what the others have written shows at the
    second meeting."""
    samples = grey_samples(tmp_path, 20)
    scorers = [Level() for _ in range(4)]
    cache_folder = tmp_path / "cache"

    # The others score their share, which is hidden at first
    for rank in (3, 2, 1):
        assert scored(samples, scorers[rank], rank, 4) is None
        for file in cache_folder.rglob("*.jsonl"):
            file.rename(file.with_suffix(".later"))

    meetings = []

    def meeting():
        meetings.append(1)
        if len(meetings) == 2:
            for file in cache_folder.rglob("*.later"):
                file.rename(file.with_suffix(".jsonl"))

    table = scored(samples, scorers[0], 0, 4, meeting=meeting)
    assert table["score"].tolist() == [i // 2 + 2 for i in range(20)]
    assert [len(scorer.seen) for scorer in scorers] == [3, 3, 2, 2]
    seen = set()
    for scorer in scorers:
        seen |= set(scorer.seen)
    assert len(seen) == 10


def test_what_another_rank_lost_the_main_one_scores(tmp_path, scored):
    samples = grey_samples(tmp_path, 20)
    scorer = Level()
    assert len(scored(samples, scorer, 0, 2)) == 20 and len(scorer.seen) == 10  # nobody was rank 1


def test_a_score_that_is_no_number_is_refused_and_not_kept(tmp_path, scored):
    class Broken(Level):
        def __call__(self, images, prompts):
            divisors = [float(level_of(image) != 2) for image in images]
            return super().__call__(images, prompts) / torch.tensor(divisors)

    with pytest.raises(ValueError, match=r"level gave no finite score for .*4.png; remove it"):
        scored(grey_samples(tmp_path), Broken(), batch_size=2)
    again = Level()
    scored(grey_samples(tmp_path), again)
    assert len(again.seen) == 4


def test_the_table_is_written_whole(tmp_path, scored):
    table = scored(grey_samples(tmp_path), Level())
    write_scores(table, tmp_path / "scores.parquet")
    written = pd.read_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)


SCORER = """
import os, time
class Slow:
    scale, preprocessing = "grey level", "none"
    def __call__(self, images, prompts):
        time.sleep(0.2)
        with open(os.environ["SEEN"], "a") as file:
            file.writelines(f"{prompt}\\n" for prompt in prompts)
        return [float(image.getpixel((0, 0))[0]) for image in images]
"""
RANK = """
import sys, pandas as pd
from pathlib import Path
from deradiff.scorers.spec import ScorerSpec
from deradiff.evaluation.scoring import score_images, write_scores
specs = {"mine": ScorerSpec(name="mine", file=sys.argv[2])}
table = score_images(pd.read_parquet(sys.argv[1]), specs, 2, Path(sys.argv[3]))
if table is not None:
    write_scores(table, Path(sys.argv[4]))
"""


def start_ranks(folder: Path, count: int = 2) -> list[subprocess.Popen]:
    """Start the ranks of one scoring of the samples in a folder, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "SEEN": str(folder / "seen"),
    }
    names = ("samples.parquet", "slow.py", "cache", "scores.parquet")
    command = [sys.executable, "-c", RANK, *(str(folder / name) for name in names)]
    root = Path(__file__).parents[2]
    processes = []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=env | own, cwd=root))
    return processes


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_and_the_same_command_again(tmp_path):
    """Without a launcher that would end the others: the rank that is left must not hang, and
    nothing of what was scored is scored again."""
    grey_samples(tmp_path, 60).to_parquet(tmp_path / "samples.parquet")
    (tmp_path / "slow.py").write_text(SCORER)
    seen = tmp_path / "seen"

    # Two ranks, one of which is killed: the other one's meeting fails, it does not wait
    first = start_ranks(tmp_path)
    while not seen.is_file() or len(seen.read_text().split()) < 8:
        time.sleep(0.05)
        assert all(p.poll() is None for p in first)
    first[1].send_signal(signal.SIGKILL)
    assert first[1].wait(60) == -signal.SIGKILL
    assert first[0].wait(120) != 0
    assert not (tmp_path / "scores.parquet").exists()

    # A batch at most was scored and not kept
    caches = (tmp_path / "cache").rglob("*.jsonl")
    kept = sum(len(file.read_text().splitlines()) for file in caches)
    before = len(seen.read_text().split())
    assert 8 <= kept <= before <= kept + 2

    # The same command again
    second = start_ranks(tmp_path)
    assert [process.wait(120) for process in second] == [0, 0]
    assert len(seen.read_text().split()) == before + 30 - kept
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["score"].tolist() == [i // 2 for i in range(60)]
