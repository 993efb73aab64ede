"""What a user types about data: the dry run, the disk that is refused, pairs by a scorer, and mistakes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.data.cache import Cache
from deradiff.data.pairs import Pairs
from deradiff.worlds import shapes
from tests.support.tiny_pipelines import save_tiny, tiny_pipeline
from tests.support.train_runs import go
from train.build import base_model
from train.config import DataConfig, ModelConfig
from train.data import cache_need


@pytest.fixture
def table(train_config, tmp_path):
    shapes.write_pairs(tmp_path / "pairs.parquet", 6, seed=0)
    return replace(
        train_config, data=DataConfig(source="table", path=str(tmp_path / "pairs.parquet"))
    )


def test_a_dry_run_counts_shows_and_estimates_and_loads_nothing(table, capsys, monkeypatch):
    from train import build

    monkeypatch.setattr(build, "make_objective", None)
    file = go(replace(table, data=replace(table.data, dry_run=True)))
    said = capsys.readouterr().out
    for words in (
        "6 pairs with a winner; 0 ties, 0 unlabelled",
        "distinct captions",
        "of latents and text embeddings",
        "memory of one device",
    ):
        assert words in said, said
    sheet, pairs = np.asarray(Image.open(file), dtype=int), Pairs(table.data.path)
    winners = {tuple(np.asarray(pairs.pictures(i)[0], dtype=int)[1, 1]) for i in range(6)}
    assert sheet.shape == (3 * 276, 512, 3)
    assert all(
        min(abs(sheet[276 * row + 12, 12] - w).max() for w in winners) < 8 for row in range(3)
    ), "the winner's corner, on the left"
    assert not (Path(table.runs) / "train").exists() and not (Path(table.runs) / "cache").exists()


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_estimate_of_the_cache_is_its_size(table, family, precision, tmp_path):
    model = ModelConfig(base=str(save_tiny(family, tmp_path / "base")), resolution=64)
    pairs, pipe = (
        Pairs(table.data.path),
        tiny_pipeline(family).to(torch.bfloat16 if precision == "bf16" else torch.float32),
    )
    config = replace(table, model=model, precision=precision)
    estimate, _ = cache_need(config, base_model(config), pairs)
    cache = Cache(tmp_path / "cache", "base", pairs, 64)
    cache.build(lambda: pipe)
    size = sum(f.stat().st_size for f in cache.folder.glob("*.safetensors"))
    assert estimate <= size < estimate + 1000  # headers


def test_too_little_disk_is_refused_before_a_weight_is_loaded(table, monkeypatch):
    from train import build

    monkeypatch.setattr(build, "make_objective", None)
    monkeypatch.setattr(
        "train.data.shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000})
    )
    with pytest.raises(
        ValueError,
        match=r"the cache of 6 rows needs .* kB and .*cache has 5 kB: give runs=<a folder on a larger disk>",
    ):
        go(table)


def test_a_cache_that_is_there_needs_no_more_disk(table, monkeypatch):
    go(table)
    monkeypatch.setattr(
        "train.data.shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000})
    )
    assert go(replace(table, name="again")).is_dir()


def test_from_prompts_to_an_anchor(train_config, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "a large red circle on a white background\na small blue ring on a black background\n"
    )
    data = DataConfig(
        source="sampled_pairs",
        prompts=str(tmp_path / "prompts.txt"),
        count=4,
        scorer="vivid",
        steps=2,
        temperature=0.1,
    )
    assert (go(replace(train_config, data=data)) / "anchor.json").is_file()
    made = sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "data").iterdir())
    assert len(made) == 2 and made[0].startswith("sampled-") and made[1].endswith("-pairs-vivid-4")
    go(replace(train_config, name="hard", data=replace(data, temperature=0.0)))
    sampled = [folder for folder in (tmp_path / "data").iterdir() if "pairs" not in folder.name]
    assert len(sampled) == 1, "another label does not sample again"


def test_a_streamed_run_ends_as_one_from_disk(table):
    from safetensors.torch import load_file

    anchors = [
        go(replace(table, name=str(s), data=replace(table.data, streaming=s)))
        for s in (False, True)
    ]
    first, second = (load_file(a / "pytorch_lora_weights.safetensors") for a in anchors)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_mistakes_about_data_are_told():
    with pytest.raises(ValueError, match=r"data\.max_broken must lie in \[0, 1\], not 2"):
        DataConfig(path="x", max_broken=2)
    with pytest.raises(ValueError, match=r"data\.temperature must be at least 0"):
        DataConfig(path="x", temperature=-1)
    with pytest.raises(ValueError, match=r"data\.prompts is missing"):
        DataConfig(source="sampled_pairs")
