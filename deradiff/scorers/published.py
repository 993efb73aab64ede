"""The published scorers that are a CLIP network: weights, image preparation, text, and scale."""

from __future__ import annotations

from dataclasses import dataclass

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L_14 = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class PublishedCLIP:
    """What a published CLIP-format scorer is.

    Attributes:
        name: of the scorer.
        checkpoint: a hub id, or a file of a hub repository, `org/name/file`.
        tokenizer: a hub id.
        letterbox: prepare images as HPSv2 does (longest side, black padding), and not as CLIP does
            (shortest side, centre crop).
        clean: clean prompts as open_clip does, and not pass them as they are.
        scaled: multiply the cosine by exp(logit_scale).
    """

    name: str
    checkpoint: str
    tokenizer: str
    letterbox: bool
    clean: bool
    scaled: bool


PICKSCORE = PublishedCLIP(
    # Kirstain et al. 2023: the Hugging Face processor of ViT-H-14, exp(logit_scale) x cosine
    name="pickscore",
    checkpoint="yuvalkirstain/PickScore_v1",
    tokenizer=VIT_H_14,
    letterbox=False,
    clean=False,
    scaled=True,
)
HPSV2 = PublishedCLIP(
    # Wu et al. 2023: bare cosine (its benchmark multiplies by 100)
    name="hpsv2",
    checkpoint="xswu/HPSv2/HPS_v2_compressed.pt",
    tokenizer=VIT_H_14,
    letterbox=True,
    clean=True,
    scaled=False,
)
HPSV2_1 = PublishedCLIP(
    name="hpsv2.1",
    checkpoint="xswu/HPSv2/HPS_v2.1_compressed.pt",
    tokenizer=VIT_H_14,
    letterbox=True,
    clean=True,
    scaled=False,
)
CLIP = PublishedCLIP(
    # The DeRaDiff tables score CLIP with HPSv2's code, and so with its image preparation
    name="clip",
    checkpoint=VIT_H_14,
    tokenizer=VIT_H_14,
    letterbox=True,
    clean=True,
    scaled=False,
)
CLIP_L14 = PublishedCLIP(
    # Radford et al. 2021, as published: centre crop
    name="clip-l14",
    checkpoint=VIT_L_14,
    tokenizer=VIT_L_14,
    letterbox=False,
    clean=True,
    scaled=False,
)

PUBLISHED_CLIPS = {clip.name: clip for clip in (PICKSCORE, HPSV2, HPSV2_1, CLIP, CLIP_L14)}
"""A published scorer in CLIP format is a row here, and a file in configs/scorers."""

AESTHETIC_HEAD = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
"""LAION's aesthetic predictor: its own file lies on GitHub, and on the hub in this copy."""

AESTHETIC_TOWER = CLIP_L14
"""What the aesthetic predictor reads: CLIP ViT-L/14."""
