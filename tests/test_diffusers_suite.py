"""`python -m benchmarks.diffusers_tests`: its checks see what is wrong, and its table counts it."""

import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from benchmarks.diffusers_tests import __main__ as command
from benchmarks.diffusers_tests import cases, outcomes
from benchmarks.diffusers_tests.checks import Checks
from benchmarks.diffusers_tests.own_cases import DDPM, ErnieImage, OwnCase
from benchmarks.diffusers_tests.scheduler_cases import schedulers_in
from benchmarks.diffusers_tests.subject import Subject, _fill_zeros
from deradiff.realignment import modes, path_kl
from deradiff.realignment.clock import Clock
from deradiff.realignment.networks import Networks


def answers(tmp_path, test_class=DDPM):
    """What the checks of a case answer."""
    subject = Subject(test_class)
    checks = Checks(subject, subject.sample(), tmp_path)
    checks.run()
    return checks.answers


def test_a_pipeline_that_is_dialled_rightly_is_exact(tmp_path):
    found = answers(tmp_path)
    assert outcomes.outcome_of(found) == outcomes.EXACT_WITHOUT_LORA
    assert found["path KL"] == found["mixture"] == "yes"


@pytest.mark.slow
@pytest.mark.parametrize("test_class", cases.OWN_CASES)
def test_every_case_of_our_own_is_exact(tmp_path, test_class):
    assert outcomes.outcome_of(answers(tmp_path, test_class)).startswith("exact")


def test_a_mixture_that_is_off_is_seen(tmp_path, monkeypatch):
    own = modes.weighted_sum
    monkeypatch.setattr(modes, "weighted_sum", lambda t, w: 1.01 * own(t, w))
    found = answers(tmp_path)
    assert found["mixture"].startswith("wrong")
    assert found["lam=0"].startswith("wrong")
    assert outcomes.outcome_of(found) == outcomes.WRONG_CASE


def test_a_path_kl_that_is_off_is_seen(tmp_path, monkeypatch):
    own = path_kl.squared
    monkeypatch.setattr(path_kl, "squared", lambda shift: 1.001 * own(shift))
    found = answers(tmp_path)
    assert found["path KL"].startswith("wrong")
    assert found["mixture"] == "yes"


def test_a_crash_and_a_refusal_are_told_apart(tmp_path, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("it broke")

    monkeypatch.setattr(Networks, "evaluate_sum", crash)
    found = answers(tmp_path)
    assert found["mode=weights"].startswith("crash: RuntimeError: it broke")
    assert outcomes.outcome_of(found) == outcomes.CRASHED
    assert outcomes.outcome_of({"is taken": "refused: no"}) == outcomes.REFUSED_CASE


class Failing(OwnCase):
    """Cannot be built."""

    pipeline_class = ErnieImage.pipeline_class

    def get_dummy_components(self):
        raise OSError("there is no network")


class Hanging(Failing):
    """Computes for ever."""

    def get_dummy_components(self):
        while True:
            torch.zeros(1)


class Sleeping(Failing):
    """Waits for ever."""

    def get_dummy_components(self):
        time.sleep(1000)


class Dying(Failing):
    """Takes its process along."""

    def get_dummy_components(self):
        command.os._exit(3)


@pytest.mark.parametrize(
    ("test_class", "outcome"),
    [
        (Failing, outcomes.NOT_BUILT),
        (Hanging, outcomes.TIMED_OUT),
        (Sleeping, outcomes.TIMED_OUT),
        (Dying, outcomes.CRASHED),
    ],
)
def test_whatever_becomes_of_a_case_is_its_record(monkeypatch, test_class, outcome):
    monkeypatch.setattr(command, "PATIENCE", 3)
    record = command.result_of(cases.Case("a", test_class), 1)
    assert record["outcome"] == outcome
    assert record["problem"]


def test_the_table_counts_each_outcome_and_says_what_is_refused():
    results = []
    for number, kind in enumerate(["image", "image", "video", "own"]):
        checks = {"is taken": "yes", "lora batched": "refused: its rows do not stay apart"}
        if number == 1:
            checks = {"is taken": "refused: it has two"}
        outcome = outcomes.outcome_of(checks)
        results.append(
            {
                "case": f"c{number}",
                "kind": kind,
                "outcome": outcome,
                "checks": checks,
                "problem": "",
            }
        )
    text = outcomes.table(results)
    assert "| cases | 2 | 1 | 1 |" in text
    assert "| exact in every check | 1 | 1 | 1 |" in text
    assert "- c1: is taken: refused: it has two" in text
    assert "- lora batched: 3 cases, as refused: its rows do not stay apart (c0)" in text


def test_cases_are_the_classes_that_build_a_pipeline():
    class Other(OwnCase):
        pipeline_class = ErnieImage.pipeline_class

        def get_dummy_components(self, kind):
            return {}

    module = SimpleNamespace(__name__="m", ErnieImage=ErnieImage, Other=Other, torch=torch)
    for member in (ErnieImage, Other):
        member.__module__, before = "m", member.__module__
        found = list(cases._test_classes(module))
        member.__module__ = before
        assert found == ([member] if member is ErnieImage else [])


def test_weights_that_are_zero_or_that_nobody_drew_are_drawn():
    network = torch.nn.Linear(2, 2)
    own = network.weight.detach().clone()
    network.bias.data = torch.tensor([0.0, 3e30])
    _fill_zeros(network)
    assert network.bias.abs().max() < 1
    assert network.bias.all()
    assert torch.equal(network.weight, own)


def test_schedulers_have_cases_with_their_settings():
    class Base(OwnCase):
        def get_dummy_components(self):
            return {"scheduler": DDIMScheduler(beta_end=0.012)}

    found = dict(schedulers_in(Base, with_variants=True))
    assert {"EulerDiscreteScheduler", "TCDScheduler", "DDIMScheduler"} <= found.keys()
    clipping = found["DDPMScheduler(clip_sample=True)"]().get_dummy_components()["scheduler"]
    assert type(clipping) is DDPMScheduler
    assert clipping.config.clip_sample
    assert clipping.config.beta_end == 0.012
    assert len(dict(schedulers_in(Base, with_variants=False))) < len(found)


def test_the_outputs_of_a_call_are_told_apart_by_image(monkeypatch):
    """Pictures and sounds are two outputs, each with all images in it."""
    subject = Subject(DDPM)
    output = {"frames": torch.arange(8.0).view(2, 4), "audio": torch.tensor([[8.0], [9.0]])}
    monkeypatch.setattr(subject, "_output", lambda options: output)
    first, second = subject.sample_each(2)
    assert first.tolist() == [0, 1, 2, 3, 8]
    assert second.tolist() == [4, 5, 6, 7, 9]


def test_the_stages_of_a_pipeline_get_other_networks_too():
    subject = Subject(DDPM)
    stage = Subject(DDPM).pipe
    own = stage.unet
    subject.pipe.stage = stage
    other = torch.nn.Linear(1, 1)
    with subject.replaced({"unet": other}):
        assert subject.pipe.unet is stage.unet is other
    assert subject.pipe.unet is stage.unet is not own


def test_a_schedule_that_stands_still_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(Clock, "_fraction_of_time", lambda clock: 0.5)
    assert answers(tmp_path)["schedule"].startswith("wrong: the fractions of time are [0.5")


def test_a_folder_without_tests_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a checkout of diffusers' repository"):
        cases.find_cases(tmp_path, "")
