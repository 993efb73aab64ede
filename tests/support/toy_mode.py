"""A mode that no row of the registry has: what a contributor writes, at its smallest."""

from deradiff.realignment.modes import Exact
from deradiff.realignment.registry import ModeLabel, ModeSpec


class Damped(Exact):
    """Mode exact at half of every lam."""

    def evaluate(self, call, lams):
        return super().evaluate(call, [0.5 * lam for lam in lams])


DAMPED = ModeSpec(
    implementation="tests.support.toy_mode:Damped",
    evaluations="2",
    label=ModeLabel(line_style="None", setting="every", setting_text="damped by {}"),
    batched=True,
)
