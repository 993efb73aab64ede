"""A lambda for each branch of guidance.

Guidance combines the output for a prompt with one for no prompt, or for a negative one. Models that
were aligned for one of the two alone (Diffusion-NPO, CHATS) act on that branch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from deradiff.method.lambdas import Lambda, Strength, validated, value_at


@dataclass(frozen=True)
class ByBranch:
    """Lambda of the conditional branch of guidance, and of all others.

    Attributes:
        conditional: of the branch that guidance goes towards.
        unconditional: of the branch, or branches, that it comes from.
    """

    conditional: Lambda
    unconditional: Lambda

    def validated(self) -> ByBranch:
        """Itself, numbers as floats.

        Raises:
            ValueError: for a lambda that is none.
        """
        return ByBranch(validated(self.conditional), validated(self.unconditional))

    def value_at(self, fraction: float) -> BranchStrengths:
        """What both mean at a fraction of time.

        Args:
            fraction: 0 at pure noise and 1 at the image.
        """
        return BranchStrengths(
            value_at(self.conditional, fraction), value_at(self.unconditional, fraction)
        )


@dataclass(frozen=True)
class BranchStrengths:
    """The strengths of both branches at one step.

    Attributes:
        conditional: of the branch that guidance goes towards.
        unconditional: of the others.
    """

    conditional: Strength
    unconditional: Strength
