"""Pairs before a judge: both orders, ties, who meets whom, and the tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deradiff.evaluation.judging import PairJudging, pairs_of_models
from deradiff.evaluation.manifest import read_cards, read_samples
from deradiff.evaluation.pairing import pair_up
from deradiff.image_tables import encode_png, write_pair_table
from deradiff.scorers import Endpoint, PairwiseSpec
from deradiff.scorers.chat import NoAnswer
from deradiff.scorers.pairwise import load_pairwise_judge
from eval.endpoint_config import PairwiseConfig
from tests.support.chat_server import QuickClock, Reply, chat_server, error
from tests.support.sampled_runs import evaluate, read, write_run

LEVELS = {"dark": 0, "grey": 100, "pale": 101, "light": 200}
NEAR = 5
"""Levels that the judge of `by_light` does not tell apart."""


@pytest.fixture
def server():
    with chat_server() as running:
        running.respond = by_light
        yield running


def by_light(question):
    """The lighter image is better, in whatever order; of like ones neither."""
    first, second = (image.getpixel((0, 0))[0] for image in question.images)
    if abs(first - second) < NEAR:
        return Reply('{"better": 0}')
    return Reply(f'{{"better": {1 if first > second else 2}}}')


def judging(server, tmp_path):
    judge = load_pairwise_judge(PairwiseSpec(Endpoint(server.url, "eye-1")), QuickClock())
    return PairJudging(judge, tmp_path / "cache")


def pairs(*names):
    """Pairs of images of one colour."""
    rows = []
    for first, second in names:
        row = {"file_0": first, "sha256_0": first, "file_1": second, "sha256_1": second}
        rows.append(row | {"prompt": "a fox"})
    return pd.DataFrame(rows)


def image_of(name):
    return Image.new("RGB", (4, 4), (LEVELS[name],) * 3)


def test_a_judge_sees_two_images_in_order_and_the_prompt(server):
    judge = load_pairwise_judge(PairwiseSpec(Endpoint(server.url, "eye-1")), QuickClock())
    light, dark = image_of("light"), image_of("dark")
    assert judge.prefer(light, dark, "two foxes") == 1
    assert judge.prefer(dark, light, "two foxes") == 0
    assert judge.prefer(dark, dark, "two foxes") == 0.5
    question = server.questions[0]
    assert [image.getpixel((0, 0))[0] for image in question.images] == [200, 0]
    assert '"two foxes"' in question.text
    server.replies('{"better": 3}')
    with pytest.raises(NoAnswer, match="was asked 3 times"):
        judge.prefer(light, dark, "two foxes")


def test_a_rubric_about_one_image_and_strange_opponents_are_refused(server):
    endpoint = Endpoint(server.url, "eye-1")
    with pytest.raises(ValueError, match="says images: 1, and one with images: 2 is needed"):
        load_pairwise_judge(PairwiseSpec(endpoint, "score"))
    with pytest.raises(ValueError, match=r"against=\[me\] must name some of reference, target"):
        PairwiseSpec(endpoint, against=["me"])
    with pytest.raises(ValueError, match="against="):
        PairwiseSpec(endpoint, against=[])


def test_every_pair_is_shown_in_both_orders_once(server, tmp_path):
    asked = pairs(("light", "dark"), ("dark", "grey"), ("grey", "pale"), ("light", "dark"))
    judge = judging(server, tmp_path)
    assert judge.open_questions(asked) == 6
    judged = judge.prefer(asked, image_of)
    assert judged["preference"].tolist() == [1, 0, 0.5, 1]
    assert judged["in_order"].tolist() == judged["swapped"].tolist()
    shown = []
    for question in server.questions:
        first, second = question.images
        shown.append((first.getpixel((0, 0))[0], second.getpixel((0, 0))[0]))
    assert sorted(shown) == sorted({(200, 0), (0, 200), (0, 100), (100, 0), (100, 101), (101, 100)})
    assert set(judged["judge"]) == {"eye-1, rubric pair"}

    # Again, also the other way round, nothing is asked
    again = judging(server, tmp_path)
    backwards = pairs(("dark", "light"), ("light", "dark"))
    assert again.open_questions(backwards) == 0
    assert again.prefer(backwards, image_of)["preference"].tolist() == [0, 1]
    assert len(server.questions) == 6


@pytest.mark.parametrize("always", [1, 2])
def test_a_judge_that_prefers_a_place_sees_only_ties(server, tmp_path, always):
    server.replies(f'{{"better": {always}}}')
    judged = judging(server, tmp_path).prefer(pairs(("light", "dark")), image_of)
    assert judged["in_order"].item() != judged["swapped"].item()
    assert judged["preference"].item() == 0.5


def test_a_preference_that_becomes_a_tie_is_a_tie(server, tmp_path):
    """Better in one order, and neither in the other."""

    def respond(question):
        is_light_first = question.images[0].getpixel((0, 0))[0] == 200
        return Reply('{"better": 1}' if is_light_first else '{"better": 0}')

    server.respond = respond
    judged = judging(server, tmp_path).prefer(pairs(("light", "dark")), image_of)
    assert judged["preference"].item() == 0.5


def test_an_image_is_as_good_as_itself_and_nobody_is_asked(server, tmp_path):
    judge = judging(server, tmp_path)
    same = pairs(("dark", "dark"))
    assert judge.open_questions(same) == 0
    assert judge.prefer(same, image_of)["preference"].tolist() == [0.5]
    assert not server.questions


# Who meets whom


def model_pairs(tmp_path, against, **settings):
    """The pairs of anchor 2000 over lambda, beside its target 4000 from scratch."""
    runs = [write_run(tmp_path, 2000, lambdas=(0.0, 0.5, 1.0), prompts=2, **settings)]
    targets = [write_run(tmp_path, 4000, lambdas=(0.0, 1.0), prompts=2)]
    samples = read_samples(runs, targets)
    cells = pair_up(samples, read_cards(samples)).cells
    return pairs_of_models(samples, cells, against)


def test_every_realigned_model_meets_the_reference(tmp_path):
    found = model_pairs(tmp_path, ["reference"])
    # The target's own images serve as targets alone
    assert found.groupby(["against", "lam"]).size().to_dict() == {
        ("reference", 0.5): 4,
        ("reference", 1.0): 4,
    }
    assert found["file_0"].str.contains("beta2000").all()
    for row in found.to_dict("records"):
        own, other = row["file_0"].rpartition("/")[2], row["file_1"].rpartition("/")[2]
        assert own == other and "lam=0.00" in row["file_1"]


def test_target_and_anchor_meet_the_cells(tmp_path):
    found = model_pairs(tmp_path, ["target", "anchor"])
    assert found.groupby(["against", "lam"]).size().to_dict() == {
        ("anchor", 0.5): 4,
        ("target", 0.5): 4,
    }
    target = found[found["against"] == "target"]
    assert target["file_1"].str.contains("beta4000").all()
    assert target["file_1"].str.contains("lam=1.00").all()


def test_without_a_reference_nobody_meets(tmp_path):
    samples = read_samples([write_run(tmp_path, 2000, lambdas=(0.5, 1.0), prompts=2)])
    assert not len(pairs_of_models(samples, [], ["reference"]))


# The tables


def by_colour(question):
    """The more colourful image is better."""
    first, second = (np.asarray(image, dtype=float).std(axis=2).mean() for image in question.images)
    return Reply(f'{{"better": {1 if first > second else 2}}}')


def judged_run(tmp_path, server, *scorers, **settings):
    server.respond = by_colour
    samples = [write_run(tmp_path, 2000, prompts=4, lambdas=(0.0, 0.5, 1.0))]
    targets = [write_run(tmp_path, 4000, prompts=4, lambdas=(0.0, 1.0))]
    pairwise = PairwiseConfig(url=server.url, model="eye-1", **settings)
    return evaluate(tmp_path, samples, *scorers, references=targets, pairwise=pairwise)


def test_the_table_says_how_often_the_realigned_model_is_preferred(tmp_path, server, capsys):
    """A realigned image is its target's, and more colourful than the reference's."""
    against = ["reference", "target"]
    run_dir = judged_run(tmp_path, server, "colourful", "crisp", against=against)
    table = read(run_dir, "judged").set_index(["against", "lam"])
    assert table["preferred"].to_dict() == {
        ("reference", 0.5): 100,
        ("reference", 1.0): 100,
        ("target", 0.5): 50,
    }
    assert set(table["pairs"]) == {8} and set(table["prompts"]) == {4}
    assert (table["preferred_low"] < table["preferred"]).all()
    assert (table["disagree"] == 0).all()
    judged = pd.read_parquet(run_dir / "judgements.parquet")
    assert len(judged) == 24

    # Two orders of sixteen pairs, for the identical ones need no judge, and a trial
    assert len(server.questions) == 2 * 16 + 1
    out = capsys.readouterr().out
    assert "eval: pairwise: 32 questions to eye-1, two for each pair" in out
    assert "eval: pairwise: 33 answers of eye-1, 3,300 tokens read and 165 written" in out

    # It stands in the report, and beside the scorers
    page = (run_dir / "report.html").read_text()
    assert "Which of two images a judge prefers" in page and "eye-1, rubric pair" in page
    beside = read(run_dir, "scorer_agreement")
    own = beside[beside["other"] == "pairwise"].set_index("scorer")
    assert own.loc["colourful", "same"] == pytest.approx(100 * (16 + 8 / 2) / 24)
    assert own.loc["colourful", "pairs"] == 24


def test_without_a_judge_the_same_run_has_no_table_of_it(tmp_path, server):
    run_dir = judged_run(tmp_path, server, "colourful")
    samples = [str(tmp_path / "sample" / "shapes-beta2000-seed0-exact")]
    targets = [str(tmp_path / "sample" / "shapes-beta4000-seed0-exact")]
    assert (run_dir / "tables" / "judged.csv").exists()
    assert evaluate(tmp_path, samples, "colourful", references=targets) == run_dir
    assert not (run_dir / "tables" / "judged.csv").exists()
    assert not (run_dir / "judgements.parquet").exists()


def test_the_same_command_asks_nothing_even_where_the_server_is_gone(tmp_path, server):
    run_dir = judged_run(tmp_path, server, "colourful")
    before = (run_dir / "tables" / "judged.csv").read_bytes()
    asked = len(server.questions)
    server.replies(error("gone", 404))
    pairwise = PairwiseConfig(url=server.url, model="eye-1")
    samples = [str(tmp_path / "sample" / "shapes-beta2000-seed0-exact")]
    targets = [str(tmp_path / "sample" / "shapes-beta4000-seed0-exact")]
    evaluate(tmp_path, samples, "colourful", references=targets, pairwise=pairwise)
    assert len(server.questions) == asked
    assert (run_dir / "tables" / "judged.csv").read_bytes() == before


def test_a_server_that_refuses_is_met_before_a_scorer_begins(tmp_path, server, monkeypatch):
    server.replies(error("no such model", 404))
    monkeypatch.setattr(
        "deradiff.evaluation.scoring.load_spec", lambda *a, **k: pytest.fail("loaded")
    )
    pairwise = PairwiseConfig(url=server.url, model="eye-1")
    words = r"^pairwise: .* no model eye-1 .*: give pairwise.url=<its address"
    with pytest.raises(ValueError, match=words):
        evaluate(tmp_path, [write_run(tmp_path, 2000)], pairwise=pairwise)
    assert len(server.questions) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "http://localhost/v1"}, "pairwise.model is missing: give pairwise.model=<name>"),
        ({"rubric": "pair"}, "pairwise.rubric is asked by nobody: give pairwise.url="),
        (
            {"url": "http://localhost/v1", "model": "m", "against": ["me"]},
            r"pairwise.against=\[me\] must name some of",
        ),
        ({"url": "nowhere", "model": "m"}, "pairwise.url=nowhere is no address"),
        (
            {"url": "http://localhost/v1", "model": "m", "rubric": "score"},
            "the rubric score cannot be used: its head says images: 1",
        ),
    ],
)
def test_what_is_missing_is_told_with_what_to_type(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        evaluate(tmp_path, [write_run(tmp_path, 2000)], pairwise=PairwiseConfig(**settings))


def test_the_judge_is_held_against_people_too(tmp_path, server):
    """It agrees with the first vote and not with the second one."""
    server.respond = by_light
    colours = ("light", "dark"), ("light", "dark")
    first, second = (list(map(encode_png, map(image_of, names))) for names in zip(*colours))
    votes = tmp_path / "votes.parquet"
    write_pair_table(votes, first, second, [1.0, 0.0], ["a", "b"])
    samples = [write_run(tmp_path, 2000, prompts=2, lambdas=(0.0, 1.0))]
    pairwise = PairwiseConfig(url=server.url, model="eye-1")
    run_dir = evaluate(tmp_path, samples, "colourful", pairwise=pairwise, votes=str(votes))
    table = read(run_dir, "scorer_agreement")
    row = table[(table["scorer"] == "pairwise") & (table["other"] == "people")]
    assert row["same"].item() == 50 and row["pairs"].item() == 2
