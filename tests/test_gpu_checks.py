"""`make gpu` on a CPU: its plan, its rows, what fails and what hangs, and the checks themselves on
tiny networks."""

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import counts, dial, plan, run, section, training
from benchmarks.gpu.bench import Bench, CannotRun
from benchmarks.gpu.plan import LIMIT, START, Check, Section
from benchmarks.gpu.rows import (
    CUT,
    FAILED,
    NOT_RUN,
    OK,
    Card,
    Costs,
    Finding,
    Row,
    markdown,
    records,
)
from benchmarks.gpu.sizes import SIZES
from benchmarks.random_pipelines import PUBLISHED, random_pipeline
from deradiff.models.flops import meta_denoiser
from deradiff.models.published import DENOISERS
from deradiff.realignment.registry import MODES
from tests.support.train_runs import own_process

GROUPS = ("sdxl bf16", "sd15 bf16", "sdxl fp16", "sd15 fp16")


@pytest.fixture(autouse=True)
def process():
    """A section is a process of its own; these tests share one."""
    with own_process():
        yield


def test_the_plan_fits_into_its_time():
    sections = plan.plan(SIZES["real"])
    assert START + sum(part.seconds for part in sections) <= LIMIT


def test_the_plan_has_every_group_and_every_mode():
    sections = plan.plan(SIZES["real"])
    names = {}
    for part in sections:
        names.setdefault(part.group, []).extend(check.name for check in part.checks)
    assert set(names) == set(GROUPS)
    for group, checks in names.items():
        assert len(set(checks)) == len(checks), group
        for mode in MODES if group.endswith("bf16") else ("exact",):
            assert any(name.startswith(f"sample 1: lora {mode}") for name in checks)
            assert any(name.startswith(f"sample 1: full {mode}") for name in checks)


@pytest.mark.parametrize(
    ("network", "denoiser", "texts"),
    [("sd15", 859_520_964, 1), ("sdxl", 2_567_463_684, 2)],
)
def test_random_networks_have_the_published_sizes(network, denoiser, texts):
    work = SIZES["real"].works[network]
    pipe = random_pipeline(
        PUBLISHED[network], ["a cat"], work.resolution, "meta", torch.bfloat16, encoders=True
    )
    assert sum(weight.numel() for weight in pipe.unet.parameters()) == denoiser
    assert sum(weight.numel() for weight in pipe.vae.parameters()) == 83_653_863
    assert {weight.dtype for weight in pipe.unet.parameters()} == {torch.bfloat16}
    assert len([name for name in pipe.components if name.startswith("text_encoder")]) == texts
    published = dict(meta_denoiser(DENOISERS[network]).config)
    own = dict(pipe.unet.config)
    for key in ("_use_default_values", "_name_or_path"):
        published.pop(key, None)
        own.pop(key, None)
    assert {k: _plain(v) for k, v in own.items()} == {k: _plain(v) for k, v in published.items()}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def test_tiny_sizes_are_counted():
    size = SIZES["tiny"]
    counted = counts.count(replace(size, works={"sd15": size.works["sd15"]}))
    assert counted.costs["sd15"].forward > 0 and counted.costs["sd15"].encoding > 0
    assert counted.memory["sd15", "full"] > counted.memory["sd15", "lora"] > 0


@pytest.mark.slow
def test_real_sizes_are_counted():
    counted = counts.count(SIZES["real"])
    assert counted.costs["sd15"].forward == pytest.approx(0.803e12, rel=1e-3)
    assert counted.costs["sdxl"].forward == pytest.approx(6.761e12, rel=1e-3)
    assert counted.costs["sdxl"].encoding == pytest.approx(4.88e12, rel=1e-2)
    assert counted.memory["sdxl", "full"] > counted.memory["sdxl", "lora"] > 5e9


# Rows


def fails(bench):
    raise RuntimeError("CUDA error: an illegal memory access\nand more")


def cannot(bench):
    raise CannotRun("there is none")


def is_wrong(bench):
    return Finding(problem="the bits differ")


def is_right(bench):
    return Finding(1.0, "image")


def checked(tmp_path, runs, seconds=1.0, left=100.0):
    """The rows of checks, and what was started."""
    checks = tuple(Check(run.__name__, seconds, run) for run in runs)
    part = Section("tiny", "sd15 bf16", checks)
    events = []
    bench = Bench("sd15 bf16", "cpu", "tiny", tmp_path)
    names = [check.name for check in checks]
    section.run_checks(part, bench, names, time.time() + left, events.append)
    rows = [Row.of(event["row"]) for event in events if "row" in event]
    return rows, [event["started"] for event in events if "started" in event]


def test_what_goes_wrong_is_a_row_and_the_next_check_runs(tmp_path):
    rows, started = checked(tmp_path, [fails, cannot, is_wrong, is_right])
    assert [row.status for row in rows] == [FAILED, NOT_RUN, FAILED, OK]
    assert rows[0].why == "RuntimeError: CUDA error: an illegal memory access"
    assert rows[1].why == "there is none"
    assert started == ["fails", "cannot", "is_wrong", "is_right"]


def test_a_check_that_would_overrun_is_cut(tmp_path):
    rows, started = checked(tmp_path, [is_right, is_right], seconds=30, left=20)
    assert [row.status for row in rows] == [CUT, CUT]
    assert "takes some 30 s" in rows[0].why
    assert not started


def test_shares_are_of_the_measured_and_of_the_named_peak():
    card = Finding(card=Card("H", 8e10, rate=5e12, peak=1e13))
    plain = Finding(2.0, "image", forwards=4)
    exact = Finding(5.0, "image", forwards=8, beside="plain", memory=3e9)
    rows = [
        Row("sdxl bf16", "card", OK, card),
        Row("sdxl bf16", "plain", OK, plain),
        Row("sdxl bf16", "exact", OK, exact),
        Row("sdxl fp16", "exact", OK, exact),
    ]
    found = records(rows, {"sdxl": Costs(forward=1e12, encoding=1e11)})
    assert found[1]["mfu"] == pytest.approx(4e12 / 2 / 5e12)
    assert found[1]["share_of_peak"] == pytest.approx(0.2)
    assert found[2]["ratio"] == 2.5
    assert found[3]["ratio"] is None and found[3]["mfu"] is None
    line = markdown(found).splitlines()[4]
    assert line == "| sdxl bf16 | exact | ok | 5 | image | 2.50 | 32.0% | 16.0% |  | 3.0 |  |"


@pytest.mark.parametrize(("estimate", "status"), [(9e9, OK), (8e9, FAILED), (12e9, FAILED)])
def test_an_estimate_of_memory_is_held_to_the_measured_peak(estimate, status):
    counted = counts.Counts({}, {("sdxl", "lora"): estimate})
    trained = Row("sdxl bf16", "train lora: first beta", OK, Finding(memory=1e10))
    assert counts.estimate_rows([trained], counted, is_gpu=True)[0].status == status
    assert counts.estimate_rows([trained], counted, is_gpu=False)[0].status == OK
    failed = Row("sdxl bf16", "train lora: first beta", FAILED, Finding(problem="no memory"))
    assert counts.estimate_rows([failed], counted, is_gpu=True)[0].status == NOT_RUN


# Processes


class Told:
    """A process of a section that has told some events, and is at work or has ended.

    Args:
        events: what it has told.
        code: its status; None: it is at work.
    """

    def __init__(self, events, code=None):
        self.events = events
        self.returncode = code
        self.process = self
        self.is_ended = False

    def poll(self):
        return self.returncode

    def new_events(self):
        events = self.events
        self.events = []
        return iter(events)

    def end(self):
        self.is_ended = True

    def last_words(self):
        return "Killed"


def followed(told, left=100.0):
    """The rows of a section of three checks of which `a` is done, and the checks that are left."""
    done = Row("sd15 bf16", "a", OK)
    told.events = [{"started": "a"}, {"row": vars(done) | {"finding": vars(done.finding)}}]
    told.events.append({"started": "b"})
    checks = [Check(name, 0.0, is_right) for name in "abc"]
    part = Section("tiny", "sd15 bf16", tuple(checks))
    rows = run.follow(told, part, checks, time.time() + left, lambda row: None)
    assert told.is_ended
    return {row.check: row for row in rows}, [check.name for check in checks]


def test_a_process_that_dies_fails_at_its_check_and_leaves_the_others():
    rows, left = followed(Told([], code=-9))
    assert rows["b"].status == FAILED
    assert rows["b"].why == "its process ended with status -9: Killed"
    assert left == ["c"]


def test_a_check_that_hangs_fails_and_leaves_the_others(monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 0.05)
    rows, left = followed(Told([]))
    assert rows["b"].status == FAILED
    assert "did not end" in rows["b"].why
    assert left == ["c"]


def test_what_is_not_done_in_time_is_cut():
    rows, left = followed(Told([]), left=0.05)
    assert [rows[name].status for name in "abc"] == [OK, CUT, CUT]
    assert not left


def test_without_cuda_one_sentence_and_a_status_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == command.NO_GPU
    said = capsys.readouterr().err.strip()
    assert said.startswith("gpu: torch") and "finds no CUDA device" in said
    assert len(said.splitlines()) == 1


def test_the_published_sizes_are_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu"])
    assert "give --size tiny" in capsys.readouterr().err


# The checks, on tiny networks


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench("sd15 bf16", "cpu", "tiny", tmp_path_factory.mktemp("gpu"))


def test_the_ends_of_the_dial_are_compared(bench, monkeypatch):
    found = dial.ends(bench, "lora", 1.0)
    assert not found.problem
    real = dial.realign
    monkeypatch.setattr(dial, "realign", lambda pipe, anchor, lam: real(pipe, anchor, 0.5))
    assert "apart" in dial.ends(bench, "lora", 1.0).problem


def test_offloading_says_why_it_does_not_run(bench):
    with pytest.raises(CannotRun, match="this is a CPU"):
        dial.offload(bench, "whole networks")


@pytest.mark.slow
def test_a_run_that_does_not_resume_is_found(bench, monkeypatch):
    assert not training.resume(bench, "lora").problem
    monkeypatch.setattr("deradiff.training.sharding.assign", lambda into, values: None)
    assert "differ" in training.resume(bench, "lora").problem


def test_a_step_is_timed_in_the_loop_of_the_train_stage(bench):
    first = training.pace(bench, "lora", training.FIRST_BETA)
    assert first.seconds > 0 and first.beside == "train lora: published"
    # One pair a step, two images: ours, its backward pass and the reference's.
    assert first.forwards == 2 * 3
    assert not list(bench.folder.glob("pace-*/checkpoints/step-*"))


@pytest.mark.slow
def test_known_errors_are_those_of_the_first_beta(tmp_path):
    bench = Bench("sd15 bf16", "cpu", "tiny", tmp_path)
    with pytest.raises(CannotRun, match="has left no errors"):
        training.pace(bench, "lora", training.KNOWN)
    training.pace(bench, "lora", training.FIRST_BETA)
    # Another method's first beta does not forget them.
    training.pace(bench, "full", training.FIRST_BETA)
    known = training.pace(bench, "lora", training.KNOWN)
    # The reference's evaluation is saved.
    assert known.forwards == 2 * 2


@pytest.mark.slow
def test_everything_runs_on_tiny_networks(tmp_path, capsys):
    status = command.main(
        ["--device", "cpu", "--size", "tiny", "--minutes", "20", "--out", str(tmp_path)]
    )
    table = (tmp_path / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| s")]
    planned = sum(len(part.checks) for part in plan.plan(SIZES["tiny"]))
    assert len(rows) == planned + 4
    assert status == 0 and "FAILED" not in table
    assert (tmp_path / "table.json").exists()
