"""The networks of the shapes world: stock classes, small, with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deradiff.worlds import networks, shapes
from tests.support.objectives import small_clip

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "deradiff" / "worlds" / "assets" / "shapes"

WRITE_TOKENIZER = """
import sys
from deradiff.worlds import networks, shapes
networks.make_tokenizer(shapes.CAPTIONS).save_pretrained(sys.argv[1])
"""


def test_words_are_one_token_each_and_anything_else_still_has_tokens():
    tokenizer = networks.make_tokenizer(shapes.CAPTIONS)
    assert len(tokenizer.tokenize(shapes.CAPTIONS[7])) == len(shapes.CAPTIONS[7].split())
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode 狐狸!")["input_ids"][1:-1]


@pytest.mark.slow
def test_a_tokenizer_is_the_same_in_every_process(tmp_path):
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", WRITE_TOKENIZER, str(tmp_path / hash_seed)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        first, second = (tmp_path / seed / name for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()


def test_a_tokenizer_breaks_ties_between_merges_in_one_way():
    """All captions together have a tie: "red" and "green" are equally frequent."""
    texts = set()
    for _ in range(20):
        tokenizer = networks.make_tokenizer(shapes.CAPTIONS)
        texts.add(tokenizer.backend_tokenizer.to_str())
    assert len(texts) == 1


@pytest.mark.parametrize("part", ["clip", "base/tokenizer"])
def test_the_training_captions_give_the_shipped_tokenizer(part):
    tokenizer = networks.make_tokenizer(sorted(shapes.training_captions()))
    made = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    shipped = json.loads((SHIPPED / part / "tokenizer.json").read_text())["model"]
    assert made["vocab"] == shipped["vocab"]
    assert made["merges"] == shipped["merges"]


def test_a_new_pipeline_is_a_stock_one(tmp_path):
    clip, tokenizer, _ = small_clip(shapes.CAPTIONS)
    pipe = networks.make_pipeline(
        networks.text_tower(clip), tokenizer, networks.make_vae(), 32, channels=(16, 32)
    )
    tokens = tokenizer(shapes.CAPTIONS[:2], padding="max_length", return_tensors="pt")
    torch.testing.assert_close(pipe.text_encoder(**tokens)[0], clip.text_model(**tokens)[0])

    pipe.save_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(tmp_path)
    image = stock(shapes.CAPTIONS[0], num_inference_steps=2, height=32, width=32).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (32, 32)
