"""What the published CLIP-format scorers are: weights, image preparation, text cleaning and scale. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    checkpoint, tokenizer: the published ones (hub ids; a file of a hub repository is `org/name/file`).
    letterbox: True prepares images as HPSv2 does (longest side, black padding), False as CLIP does (shortest side, centre crop).
    clean: whether prompts are cleaned as open_clip does, or go to the tokenizer as they are.
    scaled: whether the cosine is multiplied by exp(logit_scale).
    """

    name: str
    checkpoint: str
    tokenizer: str
    letterbox: bool
    clean: bool
    scaled: bool


_TABLE = (
    # Kirstain et al. 2023: the Hugging Face processor of ViT-H-14, exp(logit_scale) x cosine
    Recipe(
        "pickscore",
        "yuvalkirstain/PickScore_v1",
        VIT_H_14,
        letterbox=False,
        clean=False,
        scaled=True,
    ),
    # Wu et al. 2023: bare cosine (its benchmark multiplies by 100)
    Recipe(
        "hpsv2",
        "xswu/HPSv2/HPS_v2_compressed.pt",
        VIT_H_14,
        letterbox=True,
        clean=True,
        scaled=False,
    ),
    Recipe(
        "hpsv2.1",
        "xswu/HPSv2/HPS_v2.1_compressed.pt",
        VIT_H_14,
        letterbox=True,
        clean=True,
        scaled=False,
    ),
    # the DeRaDiff tables score CLIP with HPSv2's code, and so with its image preparation
    Recipe("clip", VIT_H_14, VIT_H_14, letterbox=True, clean=True, scaled=False),
    # Radford et al. 2021, as published: centre crop
    Recipe(
        "clip-l14",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14",
        letterbox=False,
        clean=True,
        scaled=False,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _TABLE}

# LAION's aesthetic predictor reads CLIP ViT-L/14; its own file lies on GitHub, and on the hub under its own name in this copy
AESTHETIC_TOWER = RECIPES["clip-l14"]
AESTHETIC_HEAD = "camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"

REWARDS = ("vivid", "crisp", "colourful")  # formulas: the first two of the shapes world
