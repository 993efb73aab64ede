"""An objective that deradiff does not have, as a newcomer would write it: a class and a row."""

from __future__ import annotations

from deradiff.anchors.anchor import AnchorCard, save_anchor
from deradiff.training.objectives.diffusion import Pretrain
from deradiff.training.objectives.registry import ObjectiveSpec


class FineTune(Pretrain):
    """Supervised fine-tuning: the denoising loss on captioned images, saved as an anchor."""

    def __init__(self, *arguments, card: AnchorCard):
        super().__init__(*arguments)
        self.card = card

    @classmethod
    def from_parts(cls, parts):
        cache = parts.cache
        pipe = parts.pipe
        return cls(
            pipe, parts.resolution, cache, parts.caption_dropout, parts.flip, card=parts.card
        )

    def save(self, folder):
        save_anchor(folder, self.network, self.card)

    def step_flops(self, examples, checkpointing):
        return 1e9 * examples * (4 if checkpointing else 3)


FINE_TUNE = ObjectiveSpec(
    implementation="tests.support.fine_tune:FineTune",
    folder="anchor",
    needs_pairs=False,
    makes_anchor=True,
    trains_denoiser=True,
    needs_base=True,
)
