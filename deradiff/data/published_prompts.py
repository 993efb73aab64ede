"""Where the published prompt sets are. It imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = "shapes"
"""The set of captions that no model of the shapes world was trained on."""


@dataclass(frozen=True)
class PromptSet:
    """Where a prompt set is: in the first repository that answers.

    Attributes:
        repos: data sets of the hub without images, in the order in which they are tried.
        files: names of JSON files that hold lists of prompts; empty: the prompts are in tables.
        split: of the tables.
        column: of the tables.
        repos_with_images: tried last. Only the column is read of their tables; the tables are not
            downloaded.
    """

    repos: tuple[str, ...]
    files: tuple[str, ...] = ()
    split: str = "train"
    column: str = ""
    repos_with_images: tuple[str, ...] = ()


PROMPT_SETS = {
    # Split test_unique of Pick-a-Pic v1, on which the paper evaluates: 500 prompts, 150 kB.
    "pickapic": PromptSet(
        ("yuvalkirstain/pickapic_v1_no_images",),
        split="test_unique",
        column="caption",
        repos_with_images=("yuvalkirstain/pickapic_v1", "pickapic-anonymous/pickapic_v1"),
    ),
    # The benchmark's 3200 prompts: 800 of each style.
    "hpdv2": PromptSet(
        ("zhwang/HPDv2", "ymhao/HPDv2"),
        files=(
            "benchmark/anime.json",
            "benchmark/concept-art.json",
            "benchmark/paintings.json",
            "benchmark/photo.json",
        ),
    ),
    "partiprompts": PromptSet(("nateraw/parti-prompts",), column="Prompt"),
    "drawbench": PromptSet(("sayakpaul/drawbench",), column="Prompts"),
}
