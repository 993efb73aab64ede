"""The eval stage on drawn sample runs: what it measures, what it refuses, what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import eval.__main__  # noqa: F401 (it registers the schema)
from configs.entry import CONFIGS
from deradiff.digests import sealed
from deradiff.evaluation.manifest import read_samples
from eval.config import EvalConfig, ScorerConfig, SelectConfig
from eval.stage import run
from tests.support.sampled_runs import Colourful, configured, evaluate, read, write_run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Anchor 2000 over five lambdas, .2 of it realigned too strongly by a planted bias, beside
    1000, 4000 and 8000 from scratch."""
    root = tmp_path_factory.mktemp("evaluated")
    samples = [
        write_run(root, 2000, bias=0.03),
        *(write_run(root, beta, lambdas=(0.0, 1.0)) for beta in (1000, 4000, 8000)),
        write_run(root, 4000, training_seed=1, lambdas=(0.0, 1.0), shift=0.1),
    ]
    return evaluate(root, samples, "vivid", "crisp")


def test_every_image_and_scorer_has_its_row(evaluated):
    scores = pd.read_parquet(evaluated / "scores.parquet")
    assert len(scores) == 2 * 12 * (5 + 4 * 2)
    assert set(scores["scorer"]) == {"vivid", "crisp"}
    assert scores["score"].notna().all()
    assert not scores.duplicated(["run", "image", "scorer"]).any()


def test_the_errors_are_those_that_the_scores_hold(evaluated):
    """Each number of the table again, from the scores, by hand."""
    scores, errors = pd.read_parquet(evaluated / "scores.parquet"), read(evaluated, "approximation")
    vivid = scores[scores["scorer"] == "vivid"]
    mean = {
        k: v
        for k, v in vivid[~vivid["run"].str.contains("seed1")]
        .groupby(["beta", "lam"])["score"]
        .mean()
        .items()
    }
    own = errors[(errors["scorer"] == "vivid") & (errors["what"] == "realigned")]
    assert sorted(own["lam"]) == [0.25, 0.5, 2.0]  # lam = 0 and 1 are no cells
    for row in own.to_dict("records"):
        target, reference = mean[row["beta_target"], 1], mean[row["beta_target"], 0]
        difference = mean[2000, row["lam"]] - target
        assert row["beta_target"] == 2000 / row["lam"]
        assert (
            row["difference"] == pytest.approx(difference) and row["difference"] > 0.01
        )  # the planted bias, with its sign
        assert row["error_low"] < row["error"] < row["error_high"]
        assert row["percent_of_mean"] == pytest.approx(100 * abs(difference / target))
        assert row["share"] == pytest.approx(100 * abs(difference / (target - reference)))
        as_is = errors[(errors["scorer"] == "vivid") & (errors["cell"] == row["cell"])].set_index(
            "what"
        )
        assert as_is.loc["anchor as is", "error"] == pytest.approx(abs(mean[2000, 1] - target))
        assert as_is.loc["reference as is", "share"] == pytest.approx(100)
        assert as_is.loc["reference as is", "error"] == pytest.approx(abs(reference - target))


def test_the_seed_floor_is_a_second_seeds_difference(evaluated):
    scores, errors = pd.read_parquet(evaluated / "scores.parquet"), read(evaluated, "approximation")
    at = (
        scores[(scores["scorer"] == "vivid") & (scores["beta"] == 4000) & (scores["lam"] == 1)]
        .groupby("run")["score"]
        .mean()
    )
    floors = errors[(errors["what"] == "seed floor") & (errors["scorer"] == "vivid")]
    assert list(floors["beta_target"]) == [4000]
    assert floors["error"].item() == pytest.approx(abs(at.iloc[0] - at.iloc[1]))
    summary = (
        read(evaluated, "summary")
        .set_index(["range", "scorer", "what"])
        .loc[("0 < lam < 1", "vivid", "realigned")]
    )
    assert (summary["cells"], summary["cells_with_floor"], summary["cells_under_floor"]) == (
        2,
        1,
        1,
    )  # a bias of .03 under a shift of .1


def test_the_summary_is_the_mean_of_its_cells(evaluated):
    errors, summary = read(evaluated, "approximation"), read(evaluated, "summary")
    for row in summary.to_dict("records"):
        within = errors["lam"] < 1 if row["range"] == "0 < lam < 1" else errors["lam"] > 1
        cells = errors[
            within & (errors["scorer"] == row["scorer"]) & (errors["what"] == row["what"])
        ]
        assert row["error"] == pytest.approx(cells["error"].mean())
        assert row["share"] == pytest.approx(cells["share"][cells["clear"]].mean(), nan_ok=True)
    assert set(summary["range"]) == {"0 < lam < 1", "lam > 1"}


def test_the_gain_is_paired_with_the_reference(evaluated):
    means = read(evaluated, "means").set_index(["scorer", "beta", "lam"]).sort_index()
    assert means.loc[("vivid", 2000.0, 0.0), "gain"].item() == 0
    half, zero = (means.xs(("vivid", 2000.0, lam)).squeeze() for lam in (0.5, 0.0))
    assert half["gain"] == pytest.approx(half["mean"] - zero["mean"])
    assert half["gain_high"] - half["gain_low"] < 0.5 * (half["mean_high"] - half["mean_low"])
    assert half["path_kl"] == pytest.approx(40 * 0.25 / 2)


def test_what_one_anchor_saves(evaluated):
    saved = read(evaluated, "savings")
    assert (saved["targets"].item(), saved["hours_percent"].item()) == (3, pytest.approx(75))
    assert len(read(evaluated, "compute")) == 5


def test_tables_are_csv_markdown_and_latex(evaluated):
    for name in ("summary", "approximation", "means", "compute", "savings"):
        lines = (evaluated / "tables" / f"{name}.md").read_text().split("\n")
        rows = [line for line in lines if line.startswith("| ")]
        (width,) = {line.count(" | ") for line in rows}
        assert len(read(evaluated, name))

        # The same rows and columns in LaTeX; the head is a row of both
        latex = (evaluated / "tables" / f"{name}.tex").read_text()
        lines = [line for line in latex.split("\n") if line.endswith(r"\\")]
        assert len(lines) == len(rows) - 1
        assert {line.count(" & ") for line in lines} == {width}


def test_a_realigned_model_that_is_its_target_has_no_error(tmp_path):
    samples = [write_run(tmp_path, 2000), write_run(tmp_path, 4000, lambdas=(0.0, 1.0))]
    errors = read(evaluate(tmp_path, samples), "approximation")
    own = errors[errors["what"] == "realigned"]
    assert (own["error_high"] == 0).all() and len(own) == 1


def test_the_nearest_training_seed_is_the_target(tmp_path, counting_scorer):
    samples = [write_run(tmp_path, 2000, training_seed=1, lambdas=(0, 0.5, 1))]
    samples += [
        write_run(tmp_path, 4000, training_seed=seed, lambdas=(0, 1), shift=0.1 * seed)
        for seed in (0, 1)
    ]
    errors = read(evaluate(tmp_path, samples), "approximation").set_index("what")
    assert errors.loc["realigned", "target"].endswith("beta4000-seed1/anchor")
    assert errors.loc["seed floor", "rival"].endswith("beta4000-seed0/anchor")


def test_modes_are_kept_apart_and_share_their_ends(tmp_path, counting_scorer):
    samples = [
        write_run(tmp_path, 2000, lambdas=(0, 0.5, 1)),
        write_run(tmp_path, 2000, lambdas=(0.5,), mode="weights", bias=0.1),
    ]
    samples.append(write_run(tmp_path, 4000, lambdas=(0, 1)))
    errors = read(evaluate(tmp_path, samples), "approximation")
    own = errors[errors["what"] == "realigned"].set_index("mode")["error"]
    assert own["exact"] == 0 and own["weights"] > 0
    assert len(errors[errors["what"] == "anchor as is"]) == 2


def test_other_ways_of_sampling_are_never_compared(tmp_path, counting_scorer, capsys):
    samples = [
        write_run(tmp_path, 2000, lambdas=(0, 0.5, 1)),
        write_run(tmp_path, 4000, lambdas=(0, 1), guidance_scale=5.0),
    ]
    assert not (evaluate(tmp_path, samples) / "tables" / "approximation.csv").exists()
    assert (
        "lam=0.5, mode exact, targets beta=4000: no sample run of an anchor at that beta"
        in capsys.readouterr().out
    )


def test_what_is_missing_is_named(tmp_path, counting_scorer, capsys):
    run_dir = evaluate(
        tmp_path, [write_run(tmp_path, 2000), write_run(tmp_path, 1000, lambdas=(1.0,), prompts=4)]
    )
    out = capsys.readouterr().out
    assert "shapes-beta2000-seed0 at lam=0.25, mode exact, targets beta=8000: no sample run" in out
    assert "mode exact, for beta=1000: 4 of 12 realigned images have no partner" in out
    assert out.strip().split("\n")[-1] == f"eval: report at {run_dir / 'report.html'}"
    assert "targets beta=8000" in (run_dir / "report.html").read_text()
    assert set(read(run_dir, "approximation")["images"]) == {8}


def test_an_anchor_of_unknown_beta_is_scored_and_not_compared(tmp_path, counting_scorer):
    run_dir = evaluate(tmp_path, [write_run_without_beta(tmp_path)])
    assert "Nothing to compare yet" in (run_dir / "report.html").read_text()
    assert len(read(run_dir, "means")) == 5


def write_run_without_beta(root):
    path = Path(write_run(root, 2000))
    rows = [
        json.loads(line) | {"beta": None, "beta_target": None, "path_kl": None}
        for line in (path / "manifest.jsonl").read_text().splitlines()
    ]
    (path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_the_same_command_resumes_after_a_kill(tmp_path, monkeypatch, counting_scorer):
    samples = [write_run(tmp_path, 2000), write_run(tmp_path, 700, lambdas=(0.0, 1.0))]
    killed = Colourful(fail_after=60)
    monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda *a, **k: killed)
    config, run_dir = configured(tmp_path, samples)
    with pytest.raises(KeyboardInterrupt):
        run(config, run_dir)
    assert (
        len(killed.scored) == 64 and not (run_dir / "scores.parquet").exists()
    )  # two batches of 32
    monkeypatch.setattr("deradiff.evaluation.scoring.load_spec", lambda *a, **k: counting_scorer)
    run(config, run_dir)
    assert (
        len(counting_scorer.scored) == 60 + 12 - 64
    )  # at lam = 0 both runs hold the same images, byte for byte
    assert len(pd.read_parquet(run_dir / "scores.parquet")) == 84
    counting_scorer.version = "2"
    run(config, run_dir)
    assert len(counting_scorer.scored) == 8 + 72  # nothing of another version counts
    assert set(pd.read_parquet(run_dir / "scores.parquet")["version"]) == {"2"}


def test_a_scorer_is_loaded_once_and_scores_in_batches(tmp_path, monkeypatch):
    loads, sizes = [], []

    class Noted(Colourful):
        def __call__(self, images, prompts):
            sizes.append(len(images))
            return super().__call__(images, prompts)

    monkeypatch.setattr(
        "deradiff.evaluation.scoring.load_spec", lambda *a, **k: loads.append(a) or Noted()
    )
    evaluate(tmp_path, [write_run(tmp_path, 2000), write_run(tmp_path, 700)], batch_size=7)
    assert len(loads) == 1 and max(sizes) == 7


def spoil(path, how):
    manifest = path / "manifest.jsonl"
    lines = manifest.read_text().split("\n")
    images = sorted(path.glob("*/*.png"))
    if how.endswith(" image"):
        spoil_images(images, how)
    else:
        spoil_manifest(manifest, lines, how)


def spoil_images(images, how):
    if how == "missing image":
        images[0].unlink()
    elif how == "altered image":
        for image in images[:5]:
            image.write_bytes(image.read_bytes() + b"x")
    elif how == "truncated image":
        images[1].write_bytes(images[1].read_bytes()[:100])


def spoil_manifest(manifest, lines, how):
    if how == "broken line":
        manifest.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    elif how == "missing key":
        rows = [json.loads(line) for line in lines if line]
        for row in rows:
            del row["sampler"]
        manifest.write_text("\n".join(json.dumps(row) for row in rows))
    elif how == "wrong type":
        manifest.write_text(lines[0].replace('"lam": 0.0', '"lam": "zero"'))
    elif how == "empty":
        manifest.write_text("\n")
    elif how == "no manifest":
        manifest.unlink()
    elif how == "outside":
        manifest.write_text(lines[0].replace('"image": "', '"image": "../../'))
    elif how == "other noise":
        manifest.write_text(
            "\n".join(
                [
                    lines[0],
                    lines[1].replace('"generator_seed": 0', '"generator_seed": 1'),
                    *lines[2:],
                ]
            )
        )
    elif how == "other prompt":
        manifest.write_text(
            "\n".join([lines[0].replace('"prompt": "a ', '"prompt": "an '), *lines[1:]])
        )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"path_kl": 3.25}', r"line 1 cannot be used \(it is not what was written\); run the"),
        ('{"lam": NaN}', "line 1 has lam=nan, which no image"),
        ('{"beta": -2000}', "line 1 has beta=-2000, which no image"),
        ('{"beta": Infinity}', "line 1 has beta=inf, which no image"),
        ('{"steps": 0}', "line 1 has steps=0, which no image"),
        (
            '{"generator_seed": [1]}',
            r"line 1 has generator_seed=\[1\], which is no int or NoneType",
        ),
        ('{"timesteps_sha256": {}}', "line 1 has timesteps_sha256={}, which is no str or"),
        ('{"every": "4"}', "line 1 has every='4', which is no int or float or"),
        ('{"lam_schedule": [1, ["a"]]}', "line 1 has lam_schedule=.*, which no image"),
        ('{"anchor": ""}', "line 1 has anchor='', which no image has"),
        ('{"branch": "\\u001b"}', "line 1 has branch=.*, which no image"),
    ],
)
def test_a_line_that_no_run_has_written_is_refused(tmp_path, line, sentence):
    manifest = Path(write_run(tmp_path, 2000)) / "manifest.jsonl"
    record = json.loads(manifest.read_text().split("\n")[0])
    if "path_kl" in line:
        record = sealed(record)
    manifest.write_text(json.dumps(record | json.loads(line)))
    with pytest.raises(ValueError, match=f"manifest.jsonl {sentence}"):
        read_samples([str(manifest.parent)])


def test_keys_of_another_version_are_left_out(tmp_path):
    run = write_run(tmp_path, 2000, every=4, unknown={"a": [1]})
    table = read_samples([run])
    assert "unknown" not in table
    assert set(table["every"]) == {4}
    assert table["ess"].isna().all(), "a key that this run lacks"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("missing image", r"1 image is \(.*lam=0.00/p0-s0.png\) missing"),
        ("altered image", r"5 images are \(.*, \.\.\.\) not what the manifest's sha256 says"),
        (
            "truncated image",
            r"1 image is \(.*lam=0.00/p0-s1.png\) not what the manifest's sha256 says",
        ),
        ("broken line", r"manifest.jsonl line 3 is not JSON"),
        ("missing key", r"manifest.jsonl line 1 lacks 'sampler'"),
        ("wrong type", r"manifest.jsonl line 1 has lam='zero'"),
        ("empty", r"manifest.jsonl is empty"),
        ("no manifest", r"has no manifest.jsonl"),
        ("outside", r"leads out of its run directory"),
        ("other noise", r"generator_seed differs at prompt_id=p0, seed=0"),
        ("other prompt", r"prompt differs at prompt_id=p0"),
    ],
)
def test_spoilt_samples_are_refused_before_a_scorer_loads(tmp_path, monkeypatch, how, sentence):
    monkeypatch.setattr(
        "deradiff.evaluation.scoring.load_spec", lambda *a, **k: pytest.fail("loaded")
    )
    path = write_run(tmp_path, 2000)
    spoil(Path(path), how)
    with pytest.raises(ValueError, match=sentence):
        evaluate(tmp_path, [path])
    assert not (tmp_path / "eval").exists()


def test_the_rest_is_refused_in_a_sentence(tmp_path, counting_scorer):
    path = write_run(tmp_path, 2000, lambdas=(0, 0.5, 1))
    with pytest.raises(ValueError, match="there is no sample run nowhere"):
        evaluate(tmp_path, ["nowhere"])
    twins = [write_run(tmp_path / side, 4000, lambdas=(0, 1)) for side in ("left", "right")]
    with pytest.raises(ValueError, match="agree in beta and training seed"):
        evaluate(tmp_path, [path, *twins])
    evaluate(tmp_path, [path], name="mine")
    with pytest.raises(ValueError, match=r"holds a run of another config: .*samples"):
        evaluate(tmp_path, [twins[0]], name="mine")


def test_a_prompt_that_a_scorer_cannot_judge_by_is_refused_before_an_image_is_scored(tmp_path):
    path = write_run(tmp_path, 2000, prompt="a fox")
    with pytest.raises(ValueError, match=r"vivid judges .*'a fox' is no caption.* name colourful"):
        evaluate(tmp_path, [path], "crisp", "vivid")
    assert not list((tmp_path / "cache").rglob("*")), "nothing was scored"

    # What the sentence says works
    assert evaluate(tmp_path, [path], "crisp", "colourful").is_dir()


def test_a_score_that_is_no_number_is_refused(tmp_path, monkeypatch, counting_scorer):
    monkeypatch.setattr(
        Colourful,
        "__call__",
        lambda self, images, prompts: torch.full((len(images),), float("nan")),
    )
    with pytest.raises(ValueError, match=r"vivid gave no finite score for .*p0-s0.png"):
        evaluate(tmp_path, [write_run(tmp_path, 2000)])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples": []}, "no samples"),
        ({"samples": ["a", "b", "a/"]}, "name a more than once"),
        ({"samples": ["a"], "references": ["b", "a/"]}, "name a more than once"),
        (
            {"select": SelectConfig(score="crisp")},
            "select.score=crisp is not among the scorers vivid",
        ),
        ({"margin": 0.0}, "margin must be above 0"),
        ({"scorers": {}}, "no scorers"),
        ({"batch_size": 0}, "batch_size must be above 0"),
    ],
)
def test_the_config_refuses(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvalConfig(**({"samples": ["a"], "scorers": {"vivid": ScorerConfig()}} | settings))


def test_an_unknown_scorer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no scorer 'vivvid'"):
        evaluate(tmp_path, [write_run(tmp_path, 2000)], "vivvid")


@pytest.mark.parametrize(
    ("override", "scorers"),
    [
        ([], ["pickscore", "hpsv2", "clip", "vivid", "crisp"]),
        (["scorers=published"], ["pickscore", "hpsv2", "clip"]),
        (["scorers=[clip,vivid]", "scorers.clip.checkpoint=here"], ["clip", "vivid"]),
    ],
)
def test_the_yaml_composes(override, scorers):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = OmegaConf.to_object(compose("eval", ["samples=[a,b]", "tracking=none", *override]))
    assert isinstance(config, EvalConfig) and list(config.scorers) == scorers
    assert [s.name for s in config.scorers.values()] == scorers
    assert config.run_name().startswith("a+1-") and config.tracking.kind == "none"


def test_names_follow_what_is_evaluated():
    name = EvalConfig(samples=["runs/sample/a"], scorers={"vivid": ScorerConfig()}).run_name()
    assert (
        name == EvalConfig(samples=["runs/sample/a/"], scorers={"vivid": ScorerConfig()}).run_name()
    )
    assert (
        name != EvalConfig(samples=["runs/sample/a"], scorers={"crisp": ScorerConfig()}).run_name()
    )


def test_a_mistake_on_the_command_line_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "eval", "samples=[]"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "eval: no samples to evaluate; type samples=[runs/sample/<a>,runs/sample/<b>]"
    )
