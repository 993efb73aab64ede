"""The report, its figures and pictures: one file without a network, whatever the prompts hold; and
what the tracker gets."""

import base64
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from html.parser import HTMLParser

import pandas as pd
import pytest

import eval.stage
from configs.tracking import Tracker
from deradiff.evaluation.figures import image_grids
from deradiff.evaluation.tables.errors import verdict
from tests.support.sampled_runs import counting, evaluate, read, write_run

FIGURES = {
    "score_against_lambda",
    "reward_against_kl",
    "reversal",
    "pictures",
    "ecdf",
    "scatter",
    "bland_altman",
}
NASTY = [
    '<script>alert("x")</script> | {{ 7*7 }}\u2028& $\\frac{1}{2}$',
    '</title><img src=x onerror=alert(1)>" autofocus onfocus="alert(2)',
    "a fox 🦊🏳️‍🌈 \u202egnitirw \x00\x07 ]]> <!-- --> ' \\",
    "x" * 10_000,
    "../../etc/passwd /abs C:\\temp\\..\\.. a\tb\r\nc",
]


@pytest.fixture
def colourful(monkeypatch):
    return counting(monkeypatch)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    samples = [
        write_run(root, 2000, bias=0.03),
        *(write_run(root, beta, lambdas=(0.0, 1.0)) for beta in (1000, 4000)),
    ]
    samples.append(write_run(root, 4000, training_seed=1, lambdas=(0.0, 1.0), shift=0.1))
    return evaluate(root, samples, "vivid", "crisp", draw=True)


class Elements(HTMLParser):
    """Every element with its attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def texts(svg):
    return [
        "".join(t.itertext())
        for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_the_report_opens_with_the_lambda_and_the_verdict_both_with_intervals(drawn):
    body = (drawn / "report.html").read_text().split("<body>")[1]
    first, second = re.findall(r'<p class="verdict">(.*?)</p>', body)
    assert body.index('class="verdict"') < body.index("<table")
    number = r"[\d.e+-]+ (?:% )?\[[\d.e+-]+, [\d.e+-]+\]"
    assert re.match(
        rf"Choose lam = \S+ \(beta_target [\d,]+\) of \S+: on prompts that had no say in it, "
        rf"vivid is {number}, {number} above",
        first,
    )
    assert re.search(
        rf"misses the model aligned from scratch by {number} \(\w+, \d+ pairs?", second
    )
    assert (
        "of the way from the reference to it" in second
        and "2 of 2 errors lie under the seed floor" in second
    )


def test_the_report_is_one_file_that_lets_nobody_elses_script_run(drawn):
    page = (drawn / "report.html").read_text()
    found = Elements(page).found
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = next(
        a["content"]
        for tag, a in found
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert len(scripts) == 1 and [tag for tag, _ in found].count("script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    links = [
        v
        for _, a in found
        for k, v in a.items()
        if k in ("src", "href", "xlink:href", "action", "data") and v
    ]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "prefers-color-scheme: dark" in page and len(page) < 4e6


def test_every_prompt_has_a_slider_over_every_lambda_of_its_row(drawn):
    found = Elements((drawn / "report.html").read_text()).found
    cards = [a["data-row"] for _, a in found if a.get("class") == "card"]
    sliders = [a for tag, a in found if tag == "input"]
    rows = [a["id"] for tag, a in found if tag == "tr" and "id" in a]
    assert cards == rows and len(set(rows)) == len(sliders) == 6 * 4
    assert [int(s["max"]) for s in sliders] == [4] * 6 + [1] * 18
    says = [a["data-says"] for tag, a in found if tag == "td" and "data-says" in a]
    assert says[:5] == [
        "lam 0, reference",
        "lam 0.25, beta 8,000",
        "lam 0.5, beta 4,000",
        "lam 1, anchor, beta 2,000",
        "lam 2, beta 1,000",
    ]


def test_pictures_stay_few_and_small_however_many_prompts(tmp_path):
    rows = pd.DataFrame([r for beta in (1000, 2000, 4000) for r in _rows(tmp_path, beta)])
    grids = image_grids.image_grids(rows)
    uris = [uri for grid in grids for line in grid.lines for uri in line.uris]
    assert (
        0 < len(uris) <= image_grids.GRID_IMAGES
        and max(len(g.lines) for g in grids) <= image_grids.GRID_PROMPTS
    )
    assert sum(map(len, uris)) < 8e6
    shown = [line.prompt for line in grids[0].lines]
    assert shown[0] == "prompt 0" and int(shown[-1].split()[1]) > 400  # spread over all 500


def test_pictures_stay_few_however_many_models(tmp_path):
    rows = pd.DataFrame(
        [r for beta in range(60) for r in _rows(tmp_path, beta, prompts=2, pixels=(8, 8))]
    )
    uris = [
        uri for grid in image_grids.image_grids(rows) for line in grid.lines for uri in line.uris
    ]
    assert len(uris) == image_grids.GRID_IMAGES


def _rows(folder, beta, prompts=500, pixels=(768, 512)):
    import numpy as np
    from PIL import Image

    file = folder / "noise.png"
    if not file.exists():
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (*pixels, 3), dtype=np.uint8)
        ).save(file)
    bench = {
        "sampler": "ddim",
        "eta": 0.0,
        "steps": 20,
        "guidance_scale": 7.5,
        "height": 768,
        "width": 512,
    }
    for prompt in range(prompts):
        for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
            yield {
                "anchor": f"a{beta}",
                "beta": beta,
                "mode": "exact",
                "lam": lam,
                "seed": 0,
                "file": str(file),
                **bench,
            } | {
                "prompt_id": f"p{prompt}",
                "prompt": f"prompt {prompt}",
            }


def test_the_figures_are_svg_with_text_in_the_pages_ink(drawn):
    assert {file.stem for file in (drawn / "plots").glob("*.svg")} == FIGURES
    for name in FIGURES:
        svg = (drawn / "plots" / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        assert "currentColor" in svg and "#123456" not in svg and "mathdefault" not in svg
    for name in FIGURES - {"reversal", "pictures"}:
        assert {"vivid", "crisp"} <= set(texts((drawn / "plots" / f"{name}.svg").read_text()))
    assert "shapes-beta2000-seed0, from the anchor back to the reference" in texts(
        (drawn / "plots" / "reversal.svg").read_text()
    )


def test_a_figure_that_is_no_longer_made_does_not_stay(tmp_path, colourful):
    run_dir = evaluate(tmp_path, [write_run(tmp_path, 2000)], name="mine")
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "ecdf.svg").write_text("of an earlier command")
    evaluate(tmp_path, [write_run(tmp_path, 2000)], name="mine")
    assert not list((run_dir / "plots").glob("*.svg"))


@pytest.mark.parametrize("prompt", NASTY, ids=["script", "attribute", "unicode", "long", "paths"])
def test_prompts_are_others_text(tmp_path, colourful, prompt):
    run_dir = evaluate(
        tmp_path, [write_run(tmp_path, 2000, prompts=2, prompt=prompt)], draw=prompt == NASTY[2]
    )
    page = (run_dir / "report.html").read_text()
    found = Elements(page).found
    assert [tag for tag, _ in found].count("script") == 1 and page.count("<script") == 1
    assert not [
        key
        for _, attributes in found
        for key in attributes
        if key.startswith("on") or key == "autofocus"
    ]
    assert not [
        a for tag, a in found if tag == "img" and not (a.get("src") or "data:").startswith("data:")
    ]
    shown = next(a["alt"] for tag, a in found if tag == "img" and a.get("alt"))
    assert shown.startswith(prompt[:20].replace("\r\n", "\n").split("\x00")[0][:10])
    assert {file.name for file in tmp_path.iterdir()} == {"train", "sample", "eval", "cache"}
    for svg in (run_dir / "plots").glob("*.svg"):
        ElementTree.fromstring(svg.read_text())
    for table in (run_dir / "tables").glob("*.md"):
        assert (
            len(
                {
                    line.count(" | ")
                    for line in table.read_text().split("\n")
                    if line.startswith("| ")
                }
            )
            == 1
        )


def test_without_a_target_the_verdict_says_what_is_missing():
    assert verdict(pd.DataFrame(), ["a at lam=.5 has none"]).endswith(
        "among the samples (a at lam=.5 has none)."
    )


def test_numbers_tables_figures_pictures_and_lineage_are_tracked(tmp_path, monkeypatch, colourful):
    class Kept(Tracker):
        def __init__(self):
            self.numbers, self.kept, self.used = {}, [], []

        def log(self, values, step=None):
            self.numbers |= values

        def table(self, name, columns, rows):
            assert all(len(row) == len(columns) for row in rows)
            self.kept.append(name)

        def image(self, name, path, caption=""):
            self.kept.append(path.name)

        def artifact(self, name, kind, path):
            self.kept.append(path.name)

        def uses(self, name, kind):
            self.used.append((name, kind))

    kept, groups = Kept(), []
    monkeypatch.setattr(
        eval.stage,
        "tracker",
        contextmanager(lambda *a, **k: (groups.append(a[-1]), iter([kept]))[1]),
    )
    more = {"base_model": "asset:shapes/base"}
    runs = [
        write_run(tmp_path, 2000, lambdas=(0, 0.5, 1), **more),
        write_run(tmp_path, 4000, lambdas=(0, 1), **more),
    ]
    run_dir = evaluate(tmp_path, runs[:1], references=runs[1:], draw=True)
    assert kept.numbers["0 < lam < 1/vivid/exact/realigned/error"] == 0
    assert kept.numbers["chosen/lam"] == read(run_dir, "selection").query("chosen")["lam"].item()
    assert {
        "summary",
        "approximation",
        "means",
        "savings",
        "compute",
        "selection",
        "wins",
        "pictures",
    } <= set(kept.kept)
    assert {f"{name}.svg" for name in FIGURES} | {"report.html", "scores.parquet"} <= set(kept.kept)
    assert kept.used == [
        ("samples-shapes-beta2000-seed0-exact", "samples"),
        ("samples-shapes-beta4000-seed0-exact", "samples"),
    ]
    assert len(groups) == 1 and groups[0].startswith("asset-shapes-base")
