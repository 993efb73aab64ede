"""The networks of the shapes world: stock classes, small, with random weights."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deradiff.worlds import networks, shapes
from tests.support.objectives import small_clip


def test_words_are_one_token_each_and_anything_else_still_has_tokens():
    tokenizer = networks.make_tokenizer(shapes.CAPTIONS)
    assert len(tokenizer.tokenize(shapes.CAPTIONS[7])) == len(shapes.CAPTIONS[7].split())
    assert tokenizer.unk_token_id not in tokenizer("Ünïcode 狐狸!")["input_ids"][1:-1]


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
