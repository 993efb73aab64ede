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

from deradiff.evaluation import scoring
from deradiff.evaluation.scoring import score_images, write_scores
from deradiff.scorers import cache
from deradiff.scorers.cache import ScoreCache, score_key
from deradiff.scorers.spec import ScorerSpec


class Level:
    """Scores a picture by its grey level plus the length of its prompt, and counts what it
    scores."""

    name, scale, preprocessing = "level", "grey level", "none"

    def __init__(self, version: str = "1") -> None:
        self.version, self.seen = version, []

    def __call__(self, images, prompts):
        self.seen += zip([image.getpixel((0, 0))[0] for image in images], prompts)
        return torch.tensor(
            [image.getpixel((0, 0))[0] + len(p) for image, p in zip(images, prompts)],
            dtype=torch.float32,
        )


def drawn(folder: Path, count: int = 12, prompt: str = "p{}") -> pd.DataFrame:
    """Samples of grey pictures, two of each."""
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
    """score_images with one `Level` behind every name; of which rank, and of how many."""

    def score(
        samples, scorer, rank=0, ranks=1, labels=("level",), batch_size=4, meeting=lambda: None
    ):
        here = SimpleNamespace(
            process_index=rank,
            num_processes=ranks,
            is_main_process=rank == 0,
            device="cpu",
            wait_for_everyone=lambda: meeting(),
        )
        monkeypatch.setattr(scoring, "process_state", lambda: here)
        monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda *a, **k: scorer)
        return score_images(
            samples,
            {label: ScorerSpec(name=label) for label in labels},
            batch_size,
            tmp_path / "cache",
        )

    return score


def test_every_image_has_its_row_and_nothing_is_scored_twice(tmp_path, scored):
    samples, scorer = drawn(tmp_path), Level()
    found = scored(samples, scorer)
    assert len(scorer.seen) == 6 and len(found) == 12  # two of each
    assert found["score"].tolist() == [i // 2 + 2 for i in range(12)]
    assert {"run", "image", "role", "scorer", "version", "scale", "preprocessing"} <= set(
        found.columns
    ) and "file" not in found
    again = Level()
    assert (
        scored(samples.iloc[::-1], again)["score"].tolist() == found["score"].tolist()[::-1]
        and not again.seen
    )
    more = pd.concat(
        [samples, samples.assign(prompt="another")]
    )  # a prompt is half of what a score depends on
    scored(more, again)
    assert len(again.seen) == 6 and {prompt for _, prompt in again.seen} == {"another"}


@pytest.mark.parametrize("changed", ["name", "version", "scale", "preprocessing"])
def test_a_scorer_that_is_another_has_other_scores(tmp_path, scored, changed):
    samples, scorer = drawn(tmp_path), Level()
    scored(samples, scorer)
    other = Level()
    setattr(other, changed, "2")
    scored(samples, other)
    assert len(other.seen) == 6


def test_a_correction_of_the_code_forgets_the_scores_of_before(tmp_path, scored, monkeypatch):
    samples = drawn(tmp_path)
    scored(samples, Level())
    monkeypatch.setattr(cache, "_source_digest", lambda: "corrected")
    again = Level()
    scored(samples, again)
    assert len(again.seen) == 6


def test_a_kill_costs_no_more_than_a_batch(tmp_path, scored):
    samples, killed = drawn(tmp_path), Level()

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


@pytest.mark.parametrize(
    "torn",
    [
        b'["a',
        b"\xff\xfe\n",
        b'{"a": 1}\n',
        b"[1, 2, 3]\n",
        b'["a", "b", NaN]\n',
        b'["a", "b", "c"]\n',
        b"null\n",
        b"\n\n",
    ],
)
def test_a_line_that_is_not_whole_counts_as_not_there(tmp_path, scored, torn):
    samples = drawn(tmp_path)
    scored(samples, Level())
    file = next((tmp_path / "cache").rglob("*.jsonl"))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + torn)
    again = Level()
    assert (
        scored(samples, again)["score"].tolist() == [i // 2 + 2 for i in range(12)]
        and len(again.seen) == 3
    )


def test_prompts_may_be_any_text(tmp_path, scored):
    for prompt in ("<script>{}\u2028", "\U0001f98a{}", "x" * 10_000 + "{}", "../../{}", '"]\n{}'):
        scorer = Level()
        scored(drawn(tmp_path, prompt=prompt), scorer)
        assert len(scorer.seen) == 6
        again = Level()
        scored(drawn(tmp_path, prompt=prompt), again)
        assert not again.seen


def test_scores_come_back_to_the_last_bit(tmp_path):
    scores = np.random.default_rng(0).normal(0, 1e-3, 50).astype(np.float32)
    ScoreCache(tmp_path, Level()).add(
        [score_key(str(i), "p") for i in range(50)], [float(s) for s in scores]
    )
    held = ScoreCache(tmp_path, Level())
    assert [np.float32(held.scores[score_key(str(i), "p")]) for i in range(50)] == list(scores)
    assert json.loads((held.folder / "scorer.json").read_text())["scale"] == "grey level"


def test_several_processes_add_at_once(tmp_path):
    caches = [ScoreCache(tmp_path, Level()) for _ in range(3)]
    for i in range(9):
        caches[i % 3].add([score_key(str(i), "p")], [i])
    caches[0].read()
    assert (
        caches[0].scores
        == ScoreCache(tmp_path, Level()).scores
        == {score_key(str(i), "p"): i for i in range(9)}
    )


def test_ranks_share_the_images_and_the_main_one_has_them_all(tmp_path, scored):
    """Every rank reads the empty cache before any writes: what the others have written shows at the
    second meeting."""
    samples, scorers, meetings = drawn(tmp_path, 20), [Level() for _ in range(4)], []
    for rank in (3, 2, 1):
        assert scored(samples, scorers[rank], rank, 4) is None
        for file in (tmp_path / "cache").rglob("*.jsonl"):
            file.rename(file.with_suffix(".later"))

    def meeting():
        meetings.append(1)
        for file in (tmp_path / "cache").rglob("*.later") if len(meetings) == 2 else ():
            file.rename(file.with_suffix(".jsonl"))

    assert scored(samples, scorers[0], 0, 4, meeting=meeting)["score"].tolist() == [
        i // 2 + 2 for i in range(20)
    ]
    assert [len(s.seen) for s in scorers] == [3, 3, 2, 2] and len(
        {s for scorer in scorers for s in scorer.seen}
    ) == 10


def test_what_another_rank_lost_the_main_one_scores(tmp_path, scored):
    samples, scorer = drawn(tmp_path, 20), Level()
    assert len(scored(samples, scorer, 0, 2)) == 20 and len(scorer.seen) == 10  # nobody was rank 1


def test_a_score_that_is_no_number_is_refused_and_not_kept(tmp_path, scored):
    class Broken(Level):
        def __call__(self, images, prompts):
            return super().__call__(images, prompts) / torch.tensor(
                [float(image.getpixel((0, 0))[0] != 2) for image in images]
            )

    with pytest.raises(ValueError, match=r"level gave no finite score for .*4.png; leave it out"):
        scored(drawn(tmp_path), Broken(), batch_size=2)
    again = Level()
    scored(drawn(tmp_path), again)
    assert len(again.seen) == 4


def test_the_table_is_written_whole(tmp_path, scored):
    found = scored(drawn(tmp_path), Level())
    write_scores(found, tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "scores.parquet"), found, check_dtype=False
    )


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
found = score_images(pd.read_parquet(sys.argv[1]), specs, 2, Path(sys.argv[3]))
if found is not None:
    write_scores(found, Path(sys.argv[4]))
"""


def ranks(folder: Path, count: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "SEEN": str(folder / "seen"),
    }
    told = [
        str(folder / name) for name in ("samples.parquet", "slow.py", "cache", "scores.parquet")
    ]
    root = Path(__file__).parents[2]
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *told],
            env=env | {"RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=root,
        )
        for r in range(count)
    ]


@pytest.mark.slow
def test_two_ranks_of_which_one_is_killed_and_the_same_command_again(tmp_path):
    """Without a launcher that would end the others: the rank that is left must not hang, and
    nothing of what was scored is scored again."""
    drawn(tmp_path, 60).to_parquet(tmp_path / "samples.parquet")
    (tmp_path / "slow.py").write_text(SCORER)
    seen = tmp_path / "seen"
    first = ranks(tmp_path)
    while not seen.is_file() or len(seen.read_text().split()) < 8:
        time.sleep(0.05)
        assert all(p.poll() is None for p in first)
    first[1].send_signal(signal.SIGKILL)
    assert (
        first[1].wait(60) == -signal.SIGKILL and first[0].wait(120) != 0
    )  # the meeting fails, it does not wait
    assert not (tmp_path / "scores.parquet").exists()
    kept = sum(len(f.read_text().splitlines()) for f in (tmp_path / "cache").rglob("*.jsonl"))
    before = len(seen.read_text().split())
    assert 8 <= kept <= before <= kept + 2  # a batch at most was scored and not kept
    second = ranks(tmp_path)
    assert [p.wait(120) for p in second] == [0, 0]
    assert len(seen.read_text().split()) == before + 30 - kept
    found = pd.read_parquet(tmp_path / "scores.parquet")
    assert found["score"].tolist() == [i // 2 for i in range(60)]
