"""Checkpoints of one training beside lambdas of its last one."""

import numpy as np
import pytest

from deradiff.evaluation.checkpoints import Place, earlier_checkpoints, place_of, trainings
from deradiff.evaluation.tables.early_stopping import weights_at
from tests.support.sampled_runs import evaluate, read, write_run

LORAS = "nvidia/finite-difference-flow-optimization/fdfo-combined-reward-no-cfg"


@pytest.mark.parametrize(
    ("anchor", "place"),
    [
        (f"{LORAS}/epoch-0000100", Place(f"{LORAS}/epoch-#", 100)),
        ("runs/train/shapes-steps300/anchor", Place("runs/train/shapes-steps#/anchor", 300)),
        ("out/checkpoint-2000", Place("out/checkpoint-#", 2000)),
        ("epochs/step_5/x.safetensors", Place("epochs/step_#/x.safetensors", 5)),
        ("runs/train/shapes-dpo-lora-beta500-seed0/anchor", None),
        ("mhdang/dpo-sd1.5-text2image-v1", None),
    ],
)
def test_the_place_in_a_training_is_in_the_name(anchor, place):
    assert place_of(anchor) == place


def test_checkpoints_of_one_training_agree_in_all_but_the_place():
    betas = {"a/epoch-10": 5.0, "a/epoch-9": 5.0, "a/epoch-8": 6.0, "b/epoch-7": 5.0, "c": None}
    assert trainings(betas) == [{9: "a/epoch-9", 10: "a/epoch-10"}]
    assert earlier_checkpoints(betas) == {"a/epoch-9"}


def test_the_same_path_kl_is_found_by_its_square_root():
    kls = [0.0, 1.0, 4.0, 16.0]
    assert np.allclose(weights_at(9.0, kls), [0, 0, 0.5, 0.5])
    assert np.allclose(weights_at(16.0, kls), [0, 0, 0, 1])
    assert np.allclose(weights_at(0.0, kls), [1, 0, 0, 0])
    assert weights_at(17.0, kls) is None, "farther than the last"
    assert weights_at(float("nan"), kls) is None
    assert weights_at(1.0, [0.0, 2.0, 1.0]) is None, "lambda and path KL disagree"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A last checkpoint over lambdas, and two earlier ones: as good at the same KL, and better.

    How vivid an image is follows from 1000 lam / beta, and from `shift` at lam = 1.
    """
    root = tmp_path_factory.mktemp("course")
    last = write_run(root, 1000, name="shapes-steps300", lambdas=(0, 0.25, 0.5, 0.75, 1))
    # path KL 40 lam^2: 10 at lam = .5
    alike = write_run(root, 1000, name="shapes-steps100", lambdas=(1,), path_kl=10.0, shift=-0.5)
    better = write_run(root, 1000, name="shapes-steps200", lambdas=(1,), path_kl=10.0, shift=-0.2)
    return evaluate(root, [last, alike, better], "vivid", draw=True)


def test_a_checkpoint_is_compared_at_the_lambda_of_the_same_path_kl(evaluated):
    table = read(evaluated, "early_stopping").set_index("checkpoint")
    assert list(table.index) == [100, 200]
    assert np.allclose(table["lam_there"], 0.5)

    # The checkpoint of 100 steps is the model at lam = .5 itself
    assert table.loc[100, "difference"] == pytest.approx(0, abs=1e-9)
    assert table.loc[100, "gain"] == pytest.approx(table.loc[100, "gain_there"])
    means = read(evaluated, "means").query("lam == 0.5")
    assert table.loc[100, "gain"] == pytest.approx(means["gain"].item())

    # That of 200 is better by a plain difference of means
    scores = read(evaluated, "means").set_index(["anchor", "lam"])["mean"]
    best = next(scores[name] for name in scores.index if "steps200" in name[0])
    assert table.loc[200, "difference_low"] > 0
    assert table.loc[200, "difference"] == pytest.approx(best - means["mean"].item())


def test_the_report_has_its_figure_and_its_sentence(evaluated):
    assert (evaluated / "plots" / "early_stopping.svg").is_file()
    page = (evaluated / "report.html").read_text()
    assert "by vivid, 1 have clearly more and 0 clearly less" in page


def test_an_earlier_checkpoint_is_no_target(tmp_path, counting_scorer):
    """Both would be targets of one beta and training seed, which is otherwise refused."""
    samples = [
        write_run(tmp_path, 500, lambdas=(0, 0.5, 1)),
        write_run(tmp_path, 1000, name="shapes-steps100", lambdas=(1,)),
        write_run(tmp_path, 1000, name="shapes-steps300", lambdas=(1,)),
    ]
    run_dir = evaluate(tmp_path, samples)
    targets = read(run_dir, "approximation").query("what == 'realigned'")["target"]
    assert list(targets) and all("steps300" in target for target in targets)
