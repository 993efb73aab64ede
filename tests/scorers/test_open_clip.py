"""open_clip's model configs as transformers' CLIPConfig."""

from __future__ import annotations

from deradiff.scorers import open_clip


def test_vit_h_14_is_what_laion_published() -> None:
    config = open_clip.clip_config(open_clip.VIT_H_14, eos_token_id=49407)
    assert config.projection_dim == 1024

    vision = config.vision_config
    assert vision.hidden_size == 1280
    assert vision.intermediate_size == 5120
    assert vision.num_hidden_layers == 32
    assert vision.num_attention_heads == 16
    assert vision.hidden_act == "gelu"
    assert vision.image_size == 224
    assert vision.patch_size == 14

    text = config.text_config
    assert text.hidden_size == 1024
    assert text.intermediate_size == 4096
    assert text.num_hidden_layers == 24
    assert text.num_attention_heads == 16
    assert text.hidden_act == "gelu"
    assert text.vocab_size == 49408
    assert text.max_position_embeddings == 77
    assert text.eos_token_id == 49407
