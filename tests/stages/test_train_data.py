"""What a user types about data: the dry run, the disk that is refused, pairs by a scorer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from deradiff.anchors.anchor import read_card
from deradiff.data.cache import Cache
from deradiff.data.pairs import Pairs
from deradiff.worlds import shapes
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.train_runs import go
from train import build
from train.build import base_model
from train.config import DataConfig, ModelConfig
from train.data import cache_need, reward_of

ROW = 276  # pixels of an example's row in the sheet of a dry run


@pytest.fixture
def table(train_config, tmp_path):
    """The config of a run on six pairs in a parquet file."""
    path = tmp_path / "pairs.parquet"
    shapes.write_pairs(path, 6, seed=0)
    return replace(train_config, data=DataConfig(source="table", path=str(path)))


@pytest.fixture
def nothing_trains(monkeypatch):
    monkeypatch.setattr(build, "make_objective", None)


def fill_disk(monkeypatch):
    """A disk with 5 kB left."""
    monkeypatch.setattr("train.data.shutil.disk_usage", lambda path: SimpleNamespace(free=5000))


def test_a_dry_run_counts_shows_and_estimates_and_loads_nothing(table, capsys, nothing_trains):
    file = go(replace(table, data=replace(table.data, dry_run=True)))
    out = capsys.readouterr().out
    for words in (
        "6 pairs with a winner; 0 ties, 0 unlabelled",
        "distinct captions",
        "of latents and text embeddings",
        "memory of one device while the cache is built",
        "memory of one device in a step",
        "disk of the checkpoints",
    ):
        assert words in out

    # In the sheet the winner stands on the left: its corner has the colour of a winner's.
    sheet = np.asarray(Image.open(file), dtype=int)
    assert sheet.shape == (3 * ROW, 512, 3)
    pairs = Pairs(table.data.path)
    winners = [np.asarray(pairs.images(i)[0], dtype=int)[1, 1] for i in range(6)]
    for row in range(3):
        corner = sheet[ROW * row + 12, 12]
        assert min(abs(corner - winner).max() for winner in winners) < 8

    assert not (Path(table.runs) / "train").exists()
    assert not (Path(table.runs) / "cache").exists()


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_estimate_of_the_cache_is_its_size(table, family, precision, bases, tmp_path):
    model = ModelConfig(base=str(bases(family)), resolution=64)
    config = replace(table, model=model, precision=precision)
    pairs = Pairs(table.data.path)
    estimate, _ = cache_need(config, base_model(config), pairs)

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipe = tiny_pipeline(family).to(dtype)
    cache = Cache(tmp_path / "cache", "base", pairs, 64)
    cache.build(lambda: pipe)
    size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    assert estimate <= size < estimate + 1000  # headers


def test_too_little_disk_is_refused_before_a_weight_is_loaded(table, nothing_trains, monkeypatch):
    fill_disk(monkeypatch)
    message = (
        r"the cache of 6 rows needs .* kB and .*cache has 5 kB: "
        r"give runs=<a folder on a larger disk>"
    )
    with pytest.raises(ValueError, match=message):
        go(table)


def test_a_cache_that_is_there_needs_no_more_disk(table, monkeypatch):
    go(table)
    fill_disk(monkeypatch)
    assert go(replace(table, name="again")).is_dir()


def test_from_prompts_to_an_anchor(train_config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a large red circle on a white background\na small blue ring on a black background\n"
    )
    data = DataConfig(
        source="sampled_pairs",
        prompts=str(prompts),
        count=4,
        scorer="vivid",
        steps=2,
        temperature=0.1,
    )
    assert (go(replace(train_config, data=data)) / "anchor.json").is_file()
    generated = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "data").iterdir())
    assert len(generated) == 2
    assert generated[0].startswith("sampled-")
    assert generated[1].endswith("-pairs-vivid-4")

    # Another label does not sample again, nor does the sum of several scorers.
    go(replace(train_config, name="hard", data=replace(data, temperature=0.0)))
    anchor = go(replace(train_config, data=replace(data, scorer={"vivid": 1, "colourful": 0.01})))
    reward = read_card(str(anchor)).reward
    assert reward == pytest.approx({"colourful": 0.1, "vivid": 10.0}), "over the temperature"
    assert list((tmp_path / "data").glob("*-pairs-colourful0.01-vivid1-4-*"))
    sampled = [folder for folder in (tmp_path / "data").iterdir() if "pairs" not in folder.name]
    assert len(sampled) == 1


def test_captions_that_a_scorer_cannot_judge_by_are_refused_before_images_are_sampled(
    train_config, tmp_path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox in the snow\n")
    data = DataConfig(source="sampled_pairs", prompts=str(prompts), count=2, scorer="vivid")
    with pytest.raises(ValueError, match="'a red fox in the snow' is no caption of the shapes"):
        go(replace(train_config, data=data))
    assert not list((tmp_path / "data").glob("sampled-*"))


def test_a_streamed_run_ends_as_one_from_disk(table):
    weights = []
    for streaming in (False, True):
        data = replace(table.data, streaming=streaming)
        folder = go(replace(table, name=str(streaming), data=data))
        assert read_card(str(folder)).reward is None  # the pairs came with their labels
        weights.append(load_file(folder / "pytorch_lora_weights.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_mistakes_about_data_are_told():
    with pytest.raises(ValueError, match=r"data\.max_broken must lie in \[0, 1\], not 2"):
        DataConfig(path="x", max_broken=2)
    with pytest.raises(ValueError, match=r"data\.temperature must be at least 0"):
        DataConfig(path="x", temperature=-1)
    with pytest.raises(ValueError, match=r"data\.prompts is missing"):
        DataConfig(source="sampled_pairs")


def test_the_reward_of_drawn_labels_is_over_their_temperature():
    scored = DataConfig(source="scored_pairs", path="x.parquet", scorer={"a": 1.0, "b": 3.0})
    assert reward_of(scored) == {"a": 1.0, "b": 3.0}
    assert reward_of(replace(scored, temperature=0.5)) == {"a": 2.0, "b": 6.0}
    assert reward_of(DataConfig(source="table", path="x.parquet")) is None


def test_a_path_that_no_source_reads_is_refused():
    """Otherwise a run on the shapes world would pass for one on the user's pairs."""
    words = r"not read by .*: give data=table data\.path=mine\.parquet"
    with pytest.raises(ValueError, match=words):
        DataConfig(source="shapes_pairs", path="mine.parquet")
