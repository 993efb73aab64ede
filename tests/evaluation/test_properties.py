"""What images are like: by hand on drawn images, once for each image, and never as a score."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.evaluation import properties, read_samples, shared_work
from deradiff.evaluation.properties import (
    Property,
    colour_entropy,
    edges,
    measure_images,
    saturation,
)
from deradiff.scorers import ScorerSpec, load_scorer
from tests.support.sampled_runs import Colourful, evaluate, read, write_run

CLIP = {"vivid": ScorerSpec("vivid"), "clip": ScorerSpec("clip")}


def halves(left, right, size=64):
    """An image of two halves, as pixels (H, W, 3)."""
    image = np.empty((size, size, 3))
    image[:, : size // 2] = left
    image[:, size // 2 :] = right
    return image


def test_edges_are_the_change_of_luminance_from_a_pixel_to_the_next():
    assert edges(halves(0.3, 0.3)) == 0
    # Sobel's filter sees a step in the two columns beside it, as half of its height in each
    assert edges(halves(0.0, 1.0)) == pytest.approx(2 * 0.5 / 64)
    assert edges(halves(0.0, 0.5)) == pytest.approx(0.5 / 64)
    ramp = np.repeat(np.linspace(0, 1, 65)[None, :, None], 65, axis=0).repeat(3, axis=2)
    assert edges(ramp[:, 1:-1]) == pytest.approx(1 / 64, rel=0.02)
    assert edges(ramp[:, 1:-1].swapaxes(0, 1)) == pytest.approx(1 / 64, rel=0.02)


def test_saturation_is_that_of_hsv():
    assert saturation(halves(0.0, 0.7)) == 0
    assert saturation(halves((1, 0, 0), (0.5, 0, 0))) == 1
    assert saturation(halves((0.8, 0.4, 0.4), 1.0)) == pytest.approx(0.25)


def test_colour_entropy_counts_colours():
    assert colour_entropy(halves(0.2, 0.2)) == 0
    assert colour_entropy(halves((1, 0, 0), (0, 0, 1))) == 1
    levels = (np.arange(8) + 0.5) / 8
    every = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(32, 16, 3)
    assert colour_entropy(every) == pytest.approx(9)


def test_a_large_image_is_measured_as_the_small_one_that_it_repeats(tmp_path):
    small = np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    Image.fromarray(small.repeat(3, 0).repeat(3, 1)).save(tmp_path / "large.png")
    measured = [properties._pixels(str(tmp_path / f"{name}.png")) for name in ("small", "large")]
    assert np.allclose(*measured, atol=1 / 255)


@pytest.fixture
def runs(tmp_path):
    """Two sample runs of three seeds."""
    one = write_run(tmp_path, 2000, prompts=3, seeds=3, lambdas=(0.0, 1.0))
    other = write_run(tmp_path, 1000, prompts=3, seeds=3, lambdas=(0.0, 1.0))
    return read_samples([one, other])


@pytest.fixture
def scorer(monkeypatch):
    """A scorer with an embedding, behind every name."""
    scorer = Colourful()
    scorer.embedded = 0

    def embed(images):
        scorer.embedded += len(images)
        return Colourful.embed(scorer, images)

    scorer.embed = embed
    monkeypatch.setattr(properties, "load_spec", lambda spec, device: scorer)
    return scorer


def test_diversity_is_the_mean_distance_of_the_seeds_of_a_prompt(tmp_path, runs, scorer):
    found = measure_images(runs, CLIP, "vivid", 32, tmp_path / "cache")
    assert found.missing == "" and found.units["diversity"] == "cosine distance by clip"

    # One prompt of one model, by hand
    images = runs.query("lam == 1 and prompt_id == 'p1' and beta == 2000").sort_values("seed")
    vectors = Colourful().embed([Image.open(file) for file in images["file"]])
    by_hand = [1 - float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    name = images["anchor"].iloc[0]
    rows = found.values.query("property == 'diversity' and lam == 1 and prompt_id == 'p1'")
    rows = rows[rows["anchor"] == name]
    assert list(rows["seed"]) == ["0, 1", "0, 2", "1, 2"]
    assert np.allclose(rows["value"], by_hand, atol=1e-6) and min(by_hand) > 1e-4


def test_nothing_is_measured_twice(tmp_path, runs, scorer, monkeypatch):
    counted = []
    pixels = properties._pixels
    monkeypatch.setattr(properties, "_pixels", lambda file: counted.append(file) or pixels(file))
    first = measure_images(runs, CLIP, "vivid", 4, tmp_path / "cache")
    # The reference's images, which both runs have, count once
    assert scorer.embedded == 3 * 9 and len(counted) == 3 * 9
    again = measure_images(runs, CLIP, "vivid", 4, tmp_path / "cache")
    assert scorer.embedded == 27 and len(counted) == 27
    assert first.values.equals(again.values)


def test_processes_share_the_work(tmp_path, runs, scorer, monkeypatch):
    for rank in (1, 0):
        state = SimpleNamespace(
            process_index=rank,
            num_processes=2,
            is_main_process=rank == 0,
            device="cpu",
            wait_for_everyone=lambda: None,
        )
        for module in (properties, shared_work):
            monkeypatch.setattr(module, "process_state", lambda state=state: state)
        found = measure_images(runs, CLIP, "vivid", 32, tmp_path / "cache")
        assert (found is None) == (rank == 1)
    assert found.values["value"].notna().all()
    assert scorer.embedded == 27, "each by one of the two"


def test_the_embedding_is_of_a_scorer_that_lambda_is_not_chosen_by(tmp_path, runs, scorer):
    both = {"pickscore": ScorerSpec("pickscore"), "clip": ScorerSpec("clip")}

    def unit(scorers, chosen):
        found = measure_images(runs, scorers, chosen, 32, tmp_path / "cache")
        return found.units["diversity"]

    assert unit(both, "pickscore") == "cosine distance by clip"
    assert unit(both, "clip") == "cosine distance by pickscore"
    assert unit({"clip": ScorerSpec("clip")}, "clip") == "cosine distance by clip"


@pytest.mark.parametrize(
    ("label", "seeds", "why"),
    [
        ("vivid", 2, "for none of the scorers has an image embedding"),
        ("clip", 1, "for each prompt was sampled with one seed"),
    ],
)
def test_what_cannot_be_measured_is_said_once(tmp_path, counting_scorer, capsys, label, seeds, why):
    run_dir = evaluate(tmp_path, [write_run(tmp_path, 2000, seeds=seeds)], label)
    assert set(read(run_dir, "properties")["property"]) == {"edges", "saturation", "colour entropy"}
    assert capsys.readouterr().out.count(why) == 1
    assert (run_dir / "report.html").read_text().count(why) == 1


def test_the_table_has_the_paired_difference_to_the_reference(tmp_path, counting_scorer):
    sampled = write_run(tmp_path, 1000, prompts=5, seeds=2)
    run_dir = evaluate(tmp_path, [sampled], "clip")
    table = read(run_dir, "properties").set_index(["property", "lam"])
    assert set(table.index.levels[0]) == {"diversity", "edges", "saturation", "colour entropy"}

    # A disc is more saturated the larger lambda is
    images = read_samples([sampled])
    by_hand = {}
    for lam, rows in images.groupby("lam"):
        values = [saturation(np.asarray(Image.open(file)) / 255) for file in rows["file"]]
        by_hand[lam] = np.mean(values)
    for lam in (0.25, 2.0):
        row = table.loc[("saturation", lam)]
        assert row["mean"] == pytest.approx(by_hand[lam])
        assert row["change"] == pytest.approx(by_hand[lam] - by_hand[0])
        assert row["change_low"] > 0
    assert table.loc[("saturation", 0), "change"] == 0


def test_a_property_is_no_score(tmp_path, counting_scorer, monkeypatch):
    """One that falls as the chosen score rises raises no alarm."""
    falling = Property(lambda pixels: -saturation(pixels), "")
    monkeypatch.setitem(properties.PROPERTIES, "edges", falling)
    run_dir = evaluate(tmp_path, [write_run(tmp_path, 500, prompts=12)], "clip")
    fallen = read(run_dir, "properties").query("property == 'edges' and lam == 2")
    assert fallen["change_high"].item() < 0
    assert read(run_dir, "selection").query("chosen")["lam"].item() == 2
    assert read(run_dir, "selection")["alarm"].isna().all()
    assert set(read(run_dir, "means")["scorer"]) == {"clip"}


def test_embeddings_of_clip_are_unit_vectors_of_its_image_tower():
    clip = load_scorer("clip", checkpoint="asset:shapes/clip")
    images = [Image.new("L", (40, 30), level) for level in range(0, 250, 7)]  # two batches
    vectors = clip.embed(images)
    assert vectors.shape[0] == 36 and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(36), atol=1e-5)
    text = clip.encode_prompts(["a large red circle on a white background"] * 36)
    scores = clip(images, ["a large red circle on a white background"] * 36)
    assert torch.allclose((vectors * text.detach()).sum(1), scores, atol=1e-5)
