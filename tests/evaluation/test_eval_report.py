"""The report, its figures and images: one file without a network, whatever the prompts hold; and
what the tracker gets."""

import base64
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import eval.stage
from configs.tracking import Tracker
from deradiff.evaluation import compare, registry
from deradiff.evaluation.figures import image_grids
from deradiff.evaluation.figures.error_plots import ecdf
from deradiff.evaluation.figures.style import COLOURS, DARK_COLOURS, INK, INK_STYLE
from deradiff.evaluation.tables.errors import verdict
from tests.support.sampled_runs import evaluate, read, write_run

FIGURES = {
    "score_against_lambda",
    "properties_against_lambda",
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
LINKS = ("src", "href", "xlink:href", "action", "data")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The run directory of an evaluation with every table and figure."""
    root = tmp_path_factory.mktemp("drawn")
    samples = [write_run(root, 2000, bias=0.03)]
    for beta in (1000, 4000):
        samples.append(write_run(root, beta, lambdas=(0.0, 1.0)))
    samples.append(write_run(root, 4000, training_seed=1, lambdas=(0.0, 1.0), shift=0.1))
    return evaluate(root, samples, "vivid", "crisp", draw=True)


class Elements(HTMLParser):
    """Every element of a page with its attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


def elements_of(page):
    """(tag, attributes) of every element of a page, in order."""
    return Elements(page).elements


def attributes_of(elements, tag):
    """The attributes of every element of one tag."""
    return [attributes for name, attributes in elements if name == tag]


def texts(drawing):
    """The texts of an SVG."""
    return ["".join(text.itertext()) for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_the_report_opens_with_the_lambda_and_the_verdict_both_with_intervals(drawn):
    body = (drawn / "report.html").read_text().split("<body>")[1]
    first, second = re.findall(r'<p class="verdict">(.*?)</p>', body)
    assert body.index('class="verdict"') < body.index("<table")
    number = r"[\d.e+-]+ (?:% )?\[[\d.e+-]+, [\d.e+-]+\]"
    assert re.match(
        rf"Choose lam = \S+ \(beta_target [\d,]+\) of \S+: on held-out prompts, "
        rf"vivid is {number}, {number} above",
        first,
    )
    missed = rf"misses the model aligned from scratch by {number} \(\w+, \d+ pairs?"
    assert re.search(missed, second)
    assert "of the way from the reference to it" in second
    assert "2 of 2 errors lie under the seed floor" in second


def test_the_report_is_one_file_that_lets_nobody_elses_script_run(drawn):
    page = (drawn / "report.html").read_text()
    elements = elements_of(page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1 and len(attributes_of(elements, "script")) == 1

    # Only the script of this digest runs
    policies = {}
    for meta in attributes_of(elements, "meta"):
        policies[meta.get("http-equiv")] = meta.get("content")
    policy = policies["Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy

    # Nothing is loaded from elsewhere
    links = []
    for _, attributes in elements:
        links += [attributes[key] for key in LINKS if attributes.get(key)]
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "prefers-color-scheme: dark" in page and len(page) < 4e6


def test_every_prompt_has_a_slider_over_every_lambda_of_its_row(drawn):
    elements = elements_of((drawn / "report.html").read_text())
    cards = [a["data-row"] for _, a in elements if a.get("class") == "card"]
    sliders = attributes_of(elements, "input")
    rows = [row["id"] for row in attributes_of(elements, "tr") if "id" in row]
    assert cards == rows and len(set(rows)) == len(sliders) == 6 * 4
    assert [int(slider["max"]) for slider in sliders] == [4] * 6 + [1] * 18
    cells = attributes_of(elements, "td")
    says = [cell["data-says"] for cell in cells if "data-says" in cell]
    assert says[:5] == [
        "lam 0, reference",
        "lam 0.25, beta 8,000",
        "lam 0.5, beta 4,000",
        "lam 1, anchor, beta 2,000",
        "lam 2, beta 1,000",
    ]


def test_images_stay_few_and_small_however_many_prompts(tmp_path):
    rows = []
    for beta in (1000, 2000, 4000):
        rows += sample_rows(tmp_path, beta)
    grids = image_grids.image_grids(pd.DataFrame(rows))
    uris = uris_of(grids)
    assert 0 < len(uris) <= image_grids.GRID_IMAGES
    assert max(len(grid.lines) for grid in grids) <= image_grids.GRID_PROMPTS
    assert sum(map(len, uris)) < 8e6
    prompts = [line.prompt for line in grids[0].lines]
    assert prompts[0] == "prompt 0" and int(prompts[-1].split()[1]) > 400  # spread over all 500


def test_images_stay_few_however_many_models(tmp_path):
    rows = []
    for beta in range(60):
        rows += sample_rows(tmp_path, beta, prompts=2, size=(8, 8))
    grids = image_grids.image_grids(pd.DataFrame(rows))
    assert len(uris_of(grids)) == image_grids.GRID_IMAGES


def uris_of(grids):
    """Every image of some grids."""
    uris = []
    for grid in grids:
        for line in grid.lines:
            uris += line.uris
    return uris


def sample_rows(folder, beta, prompts=500, size=(768, 512)):
    """Samples of one anchor, all of which are one image of noise; size: its height and width."""
    file = folder / "noise.png"
    if not file.exists():
        values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(values).save(file)
    common = {
        "run": f"run{beta}",
        "anchor": f"a{beta}",
        "shares": None,
        "beta": beta,
        "mode": "exact",
        "seed": 0,
        "file": str(file),
        "sampler": "ddim",
        "eta": 0.0,
        "steps": 20,
        "guidance_scale": 7.5,
        "height": 768,
        "width": 512,
    }
    rows = []
    for prompt in range(prompts):
        for lam in (0.0, 0.25, 0.5, 0.75, 1.0):
            own = {
                "lam": lam,
                "beta_target": beta / lam if lam else None,
                "is_own": lam in (0, 1),
                "prompt_id": f"p{prompt}",
                "prompt": f"prompt {prompt}",
            }
            rows.append(common | own)
    return rows


def test_the_figures_are_svg_with_text_in_the_pages_ink(drawn):
    assert {file.stem for file in (drawn / "plots").glob("*.svg")} == FIGURES
    svgs = {name: (drawn / "plots" / f"{name}.svg").read_text() for name in FIGURES}
    for text in svgs.values():
        ElementTree.fromstring(text)
        assert "currentColor" in text and INK not in text.replace(INK_STYLE, "")
        assert "mathdefault" not in text
    for name in FIGURES - {"reversal", "pictures", "properties_against_lambda"}:
        assert {"vivid", "crisp"} <= set(texts(svgs[name]))
    assert {"edges", "saturation"} <= set(texts(svgs["properties_against_lambda"]))
    title = "shapes-beta2000-seed0, from the anchor back to the reference"
    assert title in texts(svgs["reversal"])


def test_images_in_a_figure_have_no_clip_path(drawn):
    """Its id would follow from coordinates whose last bits differ from run to run."""
    figure = (drawn / "plots" / "reversal.svg").read_text()
    assert figure.count("<clipPath") == 1  # of the panel above the images


def test_a_figure_that_is_no_longer_made_does_not_stay(tmp_path, counting_scorer):
    run_dir = evaluate(tmp_path, [write_run(tmp_path, 2000)], name="mine")
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "ecdf.svg").write_text("of an earlier command")
    evaluate(tmp_path, [write_run(tmp_path, 2000)], name="mine")
    assert not list((run_dir / "plots").glob("*.svg"))


@pytest.mark.parametrize("prompt", NASTY, ids=["script", "attribute", "unicode", "long", "paths"])
def test_prompts_are_others_text(tmp_path, counting_scorer, prompt):
    samples = [write_run(tmp_path, 2000, prompts=2, prompt=prompt)]
    run_dir = evaluate(tmp_path, samples, "colourful", draw=prompt == NASTY[2])

    # The page holds no script but ours, no handler, and no image from elsewhere
    page = (run_dir / "report.html").read_text()
    elements = elements_of(page)
    assert len(attributes_of(elements, "script")) == 1 and page.count("<script") == 1
    for _, attributes in elements:
        assert "autofocus" not in attributes
        assert not [key for key in attributes if key.startswith("on")]
    images = attributes_of(elements, "img")
    sources = [image.get("src") for image in images]
    assert all(source.startswith("data:") for source in sources if source)
    described = next(image["alt"] for image in images if image.get("alt"))
    assert described.startswith(prompt[:20].replace("\r\n", "\n").split("\x00")[0][:10])

    # No file lies where a prompt might want it, and figures and tables are whole
    assert {file.name for file in tmp_path.iterdir()} == {"train", "sample", "eval", "cache"}
    for file in (run_dir / "plots").glob("*.svg"):
        ElementTree.fromstring(file.read_text())
    for table in (run_dir / "tables").glob("*.md"):
        lines = [line for line in table.read_text().split("\n") if line.startswith("| ")]
        assert len({line.count(" | ") for line in lines}) == 1


def test_without_a_target_the_verdict_says_what_is_missing():
    sentence = verdict(pd.DataFrame(), ["a at lam=.5 has none"])
    assert sentence.endswith("among the samples (a at lam=.5 has none).")


class KeepingTracker(Tracker):
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.numbers = {}
        self.points = []
        self.tables = {}
        self.names = []
        self.used = []

    def log(self, values, step=None):
        self.numbers |= values

    def curve(self, over, point):
        self.points.append((over, point))

    def table(self, name, columns, rows):
        assert all(len(row) == len(columns) for row in rows)
        self.names.append(name)
        self.tables[name] = pd.DataFrame(rows, columns=columns)

    def image(self, name, path, caption=""):
        self.names.append(path.name)

    def artifact(self, name, kind, path):
        self.names.append(path.name)

    def uses(self, name, kind):
        self.used.append((name, kind))


def test_numbers_tables_figures_images_and_lineage_are_tracked(
    tmp_path, monkeypatch, counting_scorer
):
    tracker = KeepingTracker()
    groups = []

    @contextmanager
    def start(*arguments):
        groups.append(arguments[-1])
        yield tracker

    monkeypatch.setattr(eval.stage, "tracker", start)
    base = {"base_model": "asset:shapes/base"}
    samples = [write_run(tmp_path, 2000, lambdas=(0, 0.5, 1, 2), **base)]
    references = [write_run(tmp_path, beta, lambdas=(0, 1), **base) for beta in (4000, 1000)]
    run_dir = evaluate(tmp_path, samples, references=references, draw=True)

    assert tracker.numbers["0 < lam < 1/vivid/exact/realigned/error"] == 0
    chosen = read(run_dir, "selection").query("chosen")
    assert tracker.numbers["chosen/lam"] == chosen["lam"].item()
    tables = {"summary", "approximation", "means", "savings", "compute", "selection", "wins"}
    assert tables | {"images"} <= set(tracker.names)

    # Tables hold numbers, with intervals as columns of their own
    means = tracker.tables["means"]
    assert {"mean", "mean_low", "mean_high", "path_kl"} <= set(means.columns)
    assert means["mean"].map(type).eq(float).all()

    # Curves over lambda: for each lambda a point, with a number for each anchor and scorer
    points = {point["lam"]: point for over, point in tracker.points if over == "lam"}
    assert list(points) == [0, 0.5, 1, 2]
    row = means.query("lam == 0.5 and scorer == 'vivid'").iloc[0]
    assert points[0.5]["score/vivid/shapes-beta2000-seed0 exact"] == row["mean"]
    assert points[0.5]["path_kl/shapes-beta2000-seed0 exact"] == row["path_kl"]

    # Images beside their scores
    images = tracker.tables["images"]
    assert len(images) == 6 * 4 and all(path.is_file() for path in images["image"])
    assert images["vivid"].notna().all() and set(images["lam"]) == {0, 0.5, 1, 2}
    assert {f"{name}.png" for name in FIGURES - {"pictures"}} <= set(tracker.names)
    assert "pictures.svg" in tracker.names
    assert {"report.html", "scores.parquet"} <= set(tracker.names)
    assert tracker.used == [
        ("samples-shapes-beta2000-seed0-exact", "samples"),
        ("samples-shapes-beta4000-seed0-exact", "samples"),
        ("samples-shapes-beta1000-seed0-exact", "samples"),
    ]
    assert len(groups) == 1 and groups[0].startswith("asset-shapes-base")


def test_one_cell_has_its_step_and_no_figure_of_a_point_a_cell(tmp_path, counting_scorer):
    samples = [write_run(tmp_path, 2000, lambdas=(0, 0.5, 1)), write_run(tmp_path, 4000)]
    run_dir = evaluate(tmp_path, samples[:1], references=samples[1:], draw=True)
    assert len(read(run_dir, "approximation").query("what == 'realigned'")) == 1
    drawn = {file.stem for file in (run_dir / "plots").glob("*.svg")}
    assert {"score_against_lambda", "ecdf"} <= drawn
    assert not drawn & {"scatter", "bland_altman"}


@pytest.mark.parametrize("cells", [1, 2])
def test_the_distribution_goes_from_none_to_all_of_the_cells(tmp_path, counting_scorer, cells):
    lambdas = (0, 0.5, 1, 0.25)[: 2 + cells]
    samples = [write_run(tmp_path, 2000, lambdas=lambdas, bias=0.03)]
    for beta in (4000, 8000)[:cells]:
        samples.append(write_run(tmp_path, beta, lambdas=(0, 1)))
    comparison = compare(samples, scorers=["colourful"], cache=tmp_path / "cache")
    figure = ecdf(comparison)
    (panel,) = figure.axes
    left, right = panel.get_xlim()
    for line in panel.lines[:-1]:  # the last is the threshold
        x, share = line.get_data()
        assert (x[0], share[0]) == (0, 0) and (x[-1], share[-1]) == (right, 100)
        assert left == 0 and sorted(set(share)) == [100 * n / cells for n in range(cells + 1)]
    assert len(panel.lines) == 4  # realigned, the anchor, the reference, the threshold
    ticks = [label.get_text() for label in panel.get_xticklabels()]
    assert ticks[0] == "0" and len(ticks) > 1


def test_a_figure_is_a_file_for_pages_one_for_papers_and_one_for_slides(drawn):
    for name in FIGURES - {"pictures"}:
        assert (drawn / "plots" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(drawn / "plots" / f"{name}.png") as image:
            assert image.width > 1000
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert not (drawn / "plots" / "pictures.pdf").exists()


def test_a_figure_tells_what_it_is_to_those_who_cannot_see_it(drawn):
    for spec in registry.FIGURES:
        if spec.name in FIGURES:
            page = ElementTree.parse(drawn / "plots" / f"{spec.name}.svg").getroot()
            assert page.get("role") == "img"
            assert page.find(f"{SVG}title").text == spec.title
            assert page.find(f"{SVG}desc").text == spec.caption


def test_lines_have_other_colours_on_a_dark_page(drawn):
    text = (drawn / "plots" / "score_against_lambda.svg").read_text()
    light, dark = COLOURS[0], DARK_COLOURS[0]
    assert f"stroke: {light}" in text
    assert f'[style*="stroke: {light}"]{{stroke:{dark}!important}}' in text
    assert COLOURS[5] not in text, "a rule for each colour that is used"


def test_a_prompt_beside_its_images_breaks_between_words():
    prompt = "a lighthouse on a rock in the middle of a stormy sea at night"
    lines = re.findall(r"<text[^>]*>(.*?)</text>", "".join(image_grids._prompt_svg(prompt, 0)))
    assert len(lines) > 1 and " ".join(lines) == prompt
