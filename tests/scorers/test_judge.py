"""The judge: a rubric's question about an image, and the number in the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from deradiff.scorers import Endpoint, check_scorer, load_scorer
from deradiff.scorers.chat import NoAnswer
from deradiff.scorers.judge import ASKS, Judge
from deradiff.scorers.rubrics import load_rubric
from tests.support.chat_server import QuickClock, Reply, error
from tests.support.scorer_images import assert_refused

GREY = [Image.new("RGB", (4, 4), (level,) * 3) for level in (1, 5, 9)]


def score_of_level(question):
    return Reply(f'{{"score": {question.level}}}')


@pytest.fixture
def judge(server):
    server.respond = score_of_level
    return Judge(Endpoint(server.url, "eye-1"), load_rubric(None, 1), QuickClock())


def test_each_image_gets_the_number_that_the_model_gives_it(server, judge):
    scores = judge(GREY, ["a fox", "two foxes", "a fox"])
    assert scores.tolist() == [1, 5, 9] and scores.dtype == torch.float32
    assert judge.scale == "rating, 1 to 10" and judge.name == "judge"
    texts = {question.level: question.text for question in server.questions}
    assert '"two foxes"' in texts[5] and '"a fox"' in texts[9]
    assert judge([], []).shape == (0,)
    with pytest.raises(ValueError, match="got 1 images and 2 prompts"):
        judge(GREY[:1], ["a", "b"])


def test_an_image_of_any_mode_arrives_as_rgb(server, judge):
    judge([Image.new("L", (3, 5), 7)], ["a"])
    (image,) = server.questions[0].images
    assert image.mode == "RGB" and image.size == (3, 5)


@pytest.mark.parametrize("unreadable", ["I like it.", '{"score": 11}', ""])
def test_an_answer_that_cannot_be_read_is_asked_for_again(server, judge, unreadable):
    server.replies(unreadable, '{"score": 3}')
    assert judge.score(GREY[0], "a fox") == 3
    first, second = server.questions
    messages = second.body["messages"]
    assert messages[0] == first.body["messages"][0]
    assert messages[1] == {"role": "assistant", "content": unreadable or "(nothing)"}
    assert messages[2]["role"] == "user"
    assert 'Answer with JSON alone, {"score": <a number of 1 to 10>}' in messages[2]["content"]


def test_an_image_without_a_number_is_refused(server, judge):
    server.replies("It is \x1b[31mgood\n.")
    words = rf"eye-1 was asked {ASKS} times .*rubric score reads; it holds no JSON object: 'It is"
    with pytest.raises(NoAnswer, match=words) as refused:
        judge.score(GREY[0], "a fox")
    assert len(server.questions) == ASKS
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_one_image_without_a_number_is_an_error_of_the_call(server, judge):
    server.respond = lambda question: (
        Reply("no") if question.level == 5 else score_of_level(question)
    )
    with pytest.raises(NoAnswer):
        judge(GREY, ["a"] * 3)


def test_a_server_is_tried_out_with_one_question(server, judge):
    judge.try_out(images=1)
    (question,) = server.questions
    assert [image.size for image in question.images] == [(64, 64)]
    server.replies("anything")  # it need not be a number
    judge.try_out(images=1)
    server.replies(error("no model", 404))
    with pytest.raises(ValueError, match="no model eye-1"):
        judge.try_out(images=1)


def test_its_version_is_that_of_what_the_number_depends_on(server, tmp_path):
    endpoint = Endpoint(server.url, "eye-1")
    rubric = load_rubric(None, 1)
    version = Judge(endpoint, rubric).version

    # Where the server is, and how it is asked, changes no number
    elsewhere = replace(endpoint, url="https://host/v1", per_minute=3.0, price_in=1.0, timeout=9.0)
    assert Judge(elsewhere, rubric).version == version

    # Neither does the name of a rubric's file
    copy = tmp_path / "copy.txt"
    copy.write_text(rubric.text)
    copied = Judge(endpoint, load_rubric(str(copy), 1))
    assert copied.version == version and copied.scale == Judge(endpoint, rubric).scale

    # What the model sees does
    copy.write_text(rubric.text.replace("10 one that", "10 an image that"))
    others = [
        Judge(replace(endpoint, model="eye-2"), rubric),
        Judge(replace(endpoint, image_side=512), rubric),
        Judge(replace(endpoint, temperature=None), rubric),
        Judge(endpoint, load_rubric(str(copy), 1)),
    ]
    assert len({version, *(other.version for other in others)}) == 5


def test_it_is_loaded_by_its_name(server):
    server.respond = score_of_level
    endpoint = Endpoint(server.url, "eye-1")
    check_scorer("judge", endpoint=endpoint)
    assert not server.questions
    scorer = load_scorer("judge", endpoint=endpoint, rubric="score")
    assert scorer(GREY[1:2], ["a"]).tolist() == [5]


def test_what_it_lacks_is_asked_for(monkeypatch):
    endpoint = Endpoint("https://host/v1", "eye-1", api_key_variable="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert_refused(r"behind a server: give endpoint=Endpoint\(url=", "judge")
    assert_refused("type export JUDGE_KEY=<the key> first", "judge", endpoint=endpoint)
    assert_refused("rubric=gone.txt is no file", "judge", endpoint=endpoint, rubric="gone.txt")
    assert_refused(
        "says images: 2, and one with images: 1 is needed",
        "judge",
        endpoint=endpoint,
        rubric="pair",
    )
    assert_refused("the scorer judge has no checkpoint", "judge", "x", endpoint=endpoint)
    assert_refused("the scorer clip has no endpoint", "clip", endpoint=endpoint)
    assert_refused("loads its weights itself: leave out rubric", "x", file=__file__, rubric="score")


def test_a_rubric_of_one_s_own_is_asked(server, tmp_path: Path):
    head = "---\nimages: 1\nanswer: last number\nlowest: 0\nhighest: 255\n---\n"
    file = tmp_path / "grey.txt"
    file.write_text(head + "How grey is the image of {prompt}?")
    server.respond = lambda question: Reply(f"It is {question.level}.")
    scorer = load_scorer("judge", endpoint=Endpoint(server.url, "eye-1"), rubric=str(file))
    assert scorer(GREY, ["a fox"] * 3).tolist() == [1, 5, 9]
    assert server.questions[0].text == "How grey is the image of a fox?"
    assert scorer.scale == "rating, 0 to 255"
