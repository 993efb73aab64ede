"""The eval stage with a judge behind a server: what is asked, kept, printed and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import eval.__main__  # noqa: F401 (it registers the schema)
from configs.entry import CONFIGS
from deradiff.image_files import read_image
from deradiff.scorers import chat
from eval.config import EvalConfig, ScorerConfig
from tests.support.chat_server import Reply, chat_server, error
from tests.support.sampled_runs import configured, evaluate, write_run

KEY = "sk-secret-0123456789"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server():
    """A server whose judge likes colour."""
    with chat_server() as running:
        running.respond = lambda question: Reply(f'{{"score": {rating(question.images[0])}}}')
        yield running


def rating(image):
    """How far the channels of an image lie apart, as a number of 1 to 10."""
    levels = np.asarray(image, dtype=float)
    return round(1 + levels.std(axis=2).mean() / 25, 3)


def judge_config(server, **settings):
    """A judge of three images at once."""
    return ScorerConfig(url=server.url, model="eye-1", in_flight=3, **settings)


def images_in(root):
    """How many different images and prompts the sample runs hold."""
    return len({file.read_bytes() for file in (root / "sample").rglob("*.png")})


def test_every_image_is_asked_about_once_and_its_cost_is_printed(tmp_path, server, capsys):
    samples = [write_run(tmp_path, 2000, prompts=4)]
    judge = judge_config(server, price_in=10.0, price_out=100.0)
    run_dir = evaluate(tmp_path, samples, "vivid", judges={"judge": judge})
    scores = pd.read_parquet(run_dir / "scores.parquet").query("scorer == 'judge'")
    assert len(scores) == 4 * 2 * 5 and scores["score"].between(1, 10).all()
    assert scores["score"].nunique() > 5 and set(scores["scale"]) == {"rating, 1 to 10"}

    # One question more, to try the server out
    asked = images_in(tmp_path) + 1
    assert len(server.questions) == asked and server.most_at_once <= 3
    cost = asked * (100 * 10 + 5 * 100) / 1e6
    told = f"eval: judge: {asked} answers of eye-1, {100 * asked:,} tokens read and {5 * asked}"
    out = capsys.readouterr().out
    assert told in out and f"cost {cost:.2f}" in out

    # The report says what judged
    page = (run_dir / "report.html").read_text()
    assert "<td>eye-1</td>" in page and "rating, 1 to 10" in page

    # The same command asks nothing, even where the server is gone
    server.replies(error("gone", 404))
    evaluate(tmp_path, samples, "vivid", judges={"judge": judge})
    assert len(server.questions) == asked and "answers of" not in capsys.readouterr().out


def test_prompts_stand_in_the_rubric(tmp_path, server):
    evaluate(
        tmp_path, [write_run(tmp_path, 2000, prompts=2)], judges={"judge": judge_config(server)}
    )
    manifest = next((tmp_path / "sample").rglob("manifest.jsonl")).read_text()
    prompts = {question.text.split('"')[1] for question in server.questions}
    assert len(prompts) == 3 and all(prompt in manifest for prompt in prompts - {"a white square"})


def test_the_key_is_sent_and_stands_in_no_file_and_on_no_screen(
    tmp_path, server, capsys, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    samples = [write_run(tmp_path, 2000, prompts=2)]
    judge = judge_config(server, api_key_variable="JUDGE_KEY")
    run_dir = evaluate(tmp_path, samples, "vivid", judges={"judge": judge})
    assert {question.headers["Authorization"] for question in server.questions} == {f"Bearer {KEY}"}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["scorers"]["judge"]["api_key_variable"] == "JUDGE_KEY"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    captured = capsys.readouterr()
    assert KEY not in captured.out + captured.err


def interrupt_after(monkeypatch, server, count):
    """Let Ctrl-C come once the server has so many questions."""
    wait = chat.wait

    def interrupted(futures, return_when):
        while len(server.questions) < count:
            wait(futures, timeout=0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "wait", interrupted)


def test_ctrl_c_loses_no_answer(tmp_path, server, monkeypatch, capsys):
    samples = [write_run(tmp_path, 2000, prompts=4)]
    judges = {"judge": judge_config(server)}
    total = images_in(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, server, 12)
        with pytest.raises(KeyboardInterrupt):
            evaluate(tmp_path, samples, "vivid", judges=judges)
    assert "answers of eye-1" in capsys.readouterr().out

    # In a process that lives on, those under way may still come
    before = len(server.questions)
    assert 12 <= before < total
    evaluate(tmp_path, samples, "vivid", judges=judges)
    assert total + 2 <= len(server.questions) <= total + 2 + 3


def test_an_image_without_a_number_is_named_and_the_others_are_kept(tmp_path, server):
    samples = [write_run(tmp_path, 2000, prompts=2)]
    like_colour = server.respond
    broken = next((tmp_path / "sample").rglob("lam=2.00/p1-s1.png"))

    def respond(question):
        is_broken = len(question.body["messages"]) > 1 or is_image(question, broken)
        return Reply("no comment") if is_broken else like_colour(question)

    server.respond = respond
    with pytest.raises(ValueError) as refused:
        evaluate(tmp_path, samples, "vivid", judges={"judge": judge_config(server)})
    message = str(refused.value)
    assert message.startswith(f"scorers.judge: no answer about {broken}: eye-1 was asked 3 times")
    assert "no comment" in message and "\n" not in message

    server.respond = like_colour
    asked = len(server.questions)
    evaluate(tmp_path, samples, "vivid", judges={"judge": judge_config(server)})
    assert len(server.questions) - asked <= 1 + 3


def is_image(question, file):
    return question.images[0].tobytes() == read_image(file).tobytes()


def test_a_server_that_refuses_is_met_before_another_scorer_begins(tmp_path, server, monkeypatch):
    server.replies(error("no such model", 404))
    monkeypatch.setattr(
        "deradiff.scorers.formulas.FormulaScorer.score_batch", lambda *a: pytest.fail("scored")
    )
    words = r"scorers.judge: .* no model eye-1 .*: give scorers.judge.url=<its address"
    with pytest.raises(ValueError, match=words):
        evaluate(tmp_path, [write_run(tmp_path, 2000)], judges={"judge": judge_config(server)})
    assert len(server.questions) == 1


def test_how_it_is_asked_makes_no_other_run(tmp_path, server):
    samples = [write_run(tmp_path, 2000, prompts=2)]
    run_dir = evaluate(tmp_path, samples, judges={"judge": judge_config(server)})
    asked = len(server.questions)
    slower = judge_config(server, per_minute=6e6, price_in=1.0, price_out=1.0, timeout=9.0)
    assert evaluate(tmp_path, samples, judges={"judge": slower}) == run_dir
    assert len(server.questions) == asked

    # Another model or size of images is another judge, and another run
    for settings in ({"model": "eye-2"}, {"image_side": 16}):
        other = ScorerConfig(**({"url": server.url, "model": "eye-1"} | settings))
        assert evaluate(tmp_path, samples, judges={"judge": other}) != run_dir
    assert len(server.questions) == 3 * asked
    assert max(max(image.size) for image in server.questions[-1].images) == 16


def test_scorers_without_a_server_keep_their_names(tmp_path):
    """A run of before is found again: no key of a judge's server counts for them."""
    samples = [write_run(tmp_path, 2000, prompts=2)]
    run_dir = evaluate(tmp_path, samples)
    file = run_dir / "config.yaml"
    old = yaml.safe_load(file.read_text())
    old["scorers"] = {"vivid": {"name": "vivid", "file": None}}
    file.write_text(yaml.safe_dump(old))
    assert evaluate(tmp_path, samples) == run_dir


def composed(*overrides):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("eval", ["samples=[a]", "tracking=none", *overrides])
        return OmegaConf.to_object(config)


def test_it_is_named_on_the_command_line():
    config = composed(
        "scorers=[vivid,judge]",
        "scorers.judge.url=http://localhost:8000/v1",
        "scorers.judge.model=UnifiedReward",
        "scorers.judge.rubric=unifiedreward-2",
    )
    assert isinstance(config, EvalConfig) and list(config.scorers) == ["vivid", "judge"]
    spec = config.scorers["judge"].spec("scorers.judge")
    assert spec.endpoint.model == "UnifiedReward" and spec.rubric == "unifiedreward-2"


REFUSED = {
    "scorers=judge": "scorers.judge asks a model behind a server: give scorers.judge.url=http",
    "scorers=judge scorers.judge.model=m": "scorers.judge.url is missing: give scorers.judge.url=",
    "scorers=judge scorers.judge.url=http://localhost/v1": "give scorers.judge.model=<name>",
    "scorers=judge scorers.judge.model=m scorers.judge.url=http://host/v1": (
        "scorers.judge.url=http://host/v1 would send images and key without encryption"
    ),
    f"scorers=judge scorers.judge.url=https://h/v1 scorers.judge.model=m "
    f"scorers.judge.api_key_variable={KEY}": (
        "scorers.judge.api_key_variable= is the name of an environment variable"
    ),
    "scorers=vivid scorers.vivid.url=https://h/v1 scorers.vivid.model=m": (
        "scorers.vivid asks no server: leave out scorers.vivid.url"
    ),
    "scorers=vivid scorers.vivid.rubric=score": "scorers.vivid asks no server",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_missing_is_told_with_what_to_type(line):
    with pytest.raises(Exception) as refused:
        composed(*line.split())
    message = str(refused.value)
    assert REFUSED[line] in message and KEY not in message


def test_a_rubric_that_is_not_there_is_looked_for(tmp_path):
    (tmp_path / "rubric.txt").write_text("x")
    samples = [write_run(tmp_path, 2000)]
    for rubric, is_there in (
        ("score", True),
        (str(tmp_path / "rubric.txt"), True),
        ("gone", False),
    ):
        judge = ScorerConfig(url="http://localhost/v1", model="m", rubric=rubric)
        config, _ = configured(tmp_path, samples, judges={"judge": judge})
        if is_there:
            config.check_paths()
        else:
            with pytest.raises(ValueError, match=r"scorers.judge.rubric=gone is not there"):
                config.check_paths()


def test_a_key_is_never_printed_by_the_command_itself():
    command = [sys.executable, "-m", "eval", "samples=[a]", "scorers=judge", "tracking=none"]
    settings = ["url=https://h/v1", "model=m", f"api_key_variable={KEY}"]
    command += [f"scorers.judge.{setting}" for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and KEY not in done.stdout + done.stderr
    assert done.stderr.startswith("eval: scorers.judge.api_key_variable= is the name of")
