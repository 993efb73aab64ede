"""`python -m sample anchor=[a,b]`, and lambdas that change in time or are negative."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.tracking import TrackingConfig
from deradiff import ramp, realign
from deradiff.evaluation.manifest import read_samples
from sample.config import SampleConfig
from sample.dial_values import scheduled
from sample.resolve import resolve
from sample.sampling import load_sampler
from sample.stage import run
from tests.support.sample_stage import (
    BETA,
    difference,
    prompt_seed,
    read_images,
    read_manifest,
    save_anchors,
)

PROMPTS = ["a red fox", "a blue cat"]
FOX = prompt_seed("a red fox", 0)
TOLERANCE = 2
"""Grey levels that batches of one and of two rows may differ in."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base model, a full anchor and a LoRA of SD1.5."""
    return save_anchors(tmp_path_factory.mktemp("tiny"), ["sd15"], scale=0.3)


@pytest.fixture
def config(tiny):
    """A short run of both anchors."""
    return SampleConfig(
        anchor=[str(tiny / name / "anchor") for name in ("sd15-lora", "sd15-full")],
        lambdas=[[0.0, 0.0], [1.0, 0.0], [0.25, 0.75], [0.2, 0.2]],
        prompts=PROMPTS,
        steps=3,
        guidance_scale=3.0,
        height=64,
        width=64,
        tracking=TrackingConfig("none"),
    )


def image_by_hand(config, lam):
    """The image of the fox at a value of lam, by `realign` alone."""
    resolved, base, anchors = resolve(config)
    pipe = load_sampler(resolved, base, torch.device("cpu"))
    generator = torch.Generator().manual_seed(FOX.generator_seed)
    with realign(pipe, anchors, lam):
        image = pipe(
            "a red fox",
            num_inference_steps=3,
            guidance_scale=3.0,
            height=64,
            width=64,
            generator=generator,
        ).images[0]
    return np.asarray(image).astype(int)


def test_a_mixture_is_what_realign_samples_of_several_anchors(config, tmp_path):
    run(config, tmp_path)
    images = read_images(tmp_path)
    expected = image_by_hand(config, [0.25, 0.75])
    assert abs(images[FOX.image((0.25, 0.75))] - expected).max() <= TOLERANCE
    assert (tmp_path / "lam=0.25,0.75").is_dir()

    # The same command samples nothing again, and more lambdas extend the run.
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    run(replace(config, lambdas=[[0.25, 0.75], [0.5, 0.5]]), tmp_path)
    for file, time in written.items():
        assert file.name == "grid.png" or file.stat().st_mtime_ns == time
    assert len(read_manifest(tmp_path)) == 5 * len(PROMPTS)


def test_the_manifest_names_a_mixture_as_one_anchor(config, tmp_path):
    run(config, tmp_path)
    lora, full = config.anchors
    records = {}
    for record in read_manifest(tmp_path):
        if record["prompt"] == "a red fox":
            records[record["image"].partition("/")[0]] = record
    reference = records["lam=0.00,0.00"]
    assert (reference["anchor"], reference["lam"], reference["shares"]) == (lora, 0, None)
    own = records["lam=1.00,0.00"]
    assert (own["anchor"], own["lam"], own["shares"]) == (lora, 1, None)
    mixture = records["lam=0.25,0.75"]
    assert mixture["anchor"] == f"0.25 {lora} + 0.75 {full}"
    assert mixture["lam"] == 1
    assert mixture["shares"] == {lora: 0.25, full: 0.75}
    assert mixture["beta"] == mixture["beta_target"] == BETA
    weaker = records["lam=0.20,0.20"]
    assert weaker["lam"] == 0.4
    assert weaker["beta_target"] == pytest.approx(BETA / 0.4)

    table = read_samples([str(tmp_path)])
    own_lams = set(table[table["is_own"]]["image"].str.partition("/")[0])
    assert own_lams == {"lam=0.00,0.00", "lam=1.00,0.00"}


def test_the_ends_of_a_mixture_are_the_runs_of_its_anchors(config, tmp_path):
    run(config, tmp_path / "both")
    lora = config.anchors[0]
    run(replace(config, anchor=lora, lambdas=[0.0, 1.0]), tmp_path / "one")
    both = read_images(tmp_path / "both")
    one = read_images(tmp_path / "one")
    for lam in (0.0, 1.0):
        end = both[FOX.image((lam, 0.0))]
        assert abs(end - one[FOX.image((lam,))]).max() <= TOLERANCE


def test_two_anchors_without_lambdas_are_mixed_from_one_to_the_other(config):
    assert replace(config, lambdas=None).lambdas == [
        [0, 0],
        [1, 0],
        [0.75, 0.25],
        [0.5, 0.5],
        [0.25, 0.75],
        [0, 1],
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambdas": [0.5]}, r"are lists of 2 numbers, and 0.5 is not: give lambdas=\[\[0.3,0.7\]"),
        ({"lambdas": [[0.5, 0.5, 0]]}, "2 anchors and 3 lambdas"),
        ({"lambdas": [[0.5, "a"]]}, "'a' is not"),
        ({"mode": "reuse"}, "mode=reuse is for one anchor: give mode=exact"),
        ({"lambdas": [[0.5, 0.5], 1.0]}, "are lists of 2 numbers, and 1.0 is not"),
        ({"mode": "sampled", "lambdas": [[0.6, 0.6]]}, "from 0 to 1 in sum, not 1.2"),
        ({"targets": [500.0]}, "targets, bake and trust_region are for one anchor"),
        ({"trust_region": 1.0}, "targets, bake and trust_region are for one anchor"),
        ({"anchor": ["a", "b", "c"], "lambdas": None}, "of 3 anchors give lists of as many"),
    ],
)
def test_what_several_anchors_cannot_have_is_refused(config, options, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **options)


def test_anchors_of_different_bases_need_to_be_told_which(config, tmp_path):
    other = save_anchors(tmp_path, ["sd15"], scale=0.3)
    mixed = replace(config, anchor=[config.anchors[0], str(other / "sd15-lora/anchor")])
    with pytest.raises(ValueError, match=r"from different bases, .* give model\.base="):
        resolve(mixed)


@pytest.mark.parametrize("schedule", [[1.0, 0.2], [[0, 1.0], [0.5, 0.2]]])
def test_lambda_may_change_in_time(config, tmp_path, schedule):
    one = replace(config, anchor=config.anchors[0], lambdas=[0.0, 1.0], lam_schedule=schedule)
    run(one, tmp_path)
    images = read_images(tmp_path)
    expected = image_by_hand(one, scheduled(1.0, schedule))
    assert abs(images[FOX.image((1.0,))] - expected).max() <= TOLERANCE
    plain = image_by_hand(one, 1.0)
    assert abs(images[FOX.image((1.0,))] - plain).max() > TOLERANCE

    # It is no anchor, and imitates no model.
    table = read_samples([str(tmp_path)]).set_index("lam")
    assert not table.loc[1.0, "is_own"].any()
    assert table.loc[0.0, "is_own"].all()
    assert table["beta_target"].isna().all()
    assert set(table["mode"]) == {f"exact schedule {schedule}"}
    assert one.run_name() != replace(one, lam_schedule=[]).run_name()


def test_a_ramp_multiplies_lambda():
    for fraction in (0.0, 0.3, 1.0):
        assert scheduled(0.5, [1.0, 0.2])(fraction) == pytest.approx(ramp(0.5, 0.1)(fraction))


def test_a_schedule_whose_times_do_not_rise_is_refused(config):
    wrong = replace(config, lam_schedule=[[0.5, 1.0], [0.2, 0.2]])
    with pytest.raises(ValueError, match="fractions of a piecewise lam rise"):
        resolve(wrong)


def test_a_negative_lambda_is_sampled_and_said_once(config, tmp_path, capsys):
    one = replace(config, anchor=config.anchors[0], lambdas=[-0.5, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(one, tmp_path)
    assert capsys.readouterr().out.count("a negative lam goes from the reference away") == 1
    negative, reference = [(lam,) for lam in (-0.5, 0.0)]
    images = read_images(tmp_path)
    assert difference(images, images) == 0
    assert abs(images[FOX.image(negative)] - images[FOX.image(reference)]).max() > TOLERANCE
    record = next(record for record in read_manifest(tmp_path) if record["lam"] == -0.5)
    assert record["beta_target"] is None


def test_what_is_no_anchor_is_not_called_one(config, tmp_path, capsys):
    one = replace(config, anchor=config.anchors[0], lambdas=[1.0])
    for options in ({"branch": "conditional"}, {"lam_schedule": [1.0, 0.2]}):
        run(replace(one, **options), tmp_path / str(len(options)) / next(iter(options)))
        said = capsys.readouterr().out
        assert "(the anchor)" not in said
        assert "beta_target unknown" in said
    assert "lambda times [1.0, 0.2] in time" in said


def test_a_branch_that_the_pipeline_does_not_have_is_refused(config):
    """Otherwise every lambda would sample the reference, in silence."""
    one = replace(config, anchor=config.anchors[0], lambdas=[1.0], guidance_scale=1.0)
    with pytest.raises(ValueError, match="branch=unconditional needs guidance"):
        resolve(replace(one, branch="unconditional"))
    resolve(replace(one, branch="conditional"))
