"""How the pairs of an optimiser step are shared among ranks. Light: it imports no torch.

A step has a fixed number of pairs. They are cut into micro-batches by their places in the step, and
the ranks take turns. So the gradient of a step is the same on any number of ranks, but for the
order of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """The micro-batches of a step, and which of them a rank takes.

    Where they do not come out even, some ranks have nothing left in the last turn. They repeat a
    micro-batch that does not count, because all ranks have to take part in each forward pass of a
    sharded network.

    Args:
        pairs_per_step: pairs of one optimiser step on all ranks; for objectives without pairs,
            examples.
        batch_size: pairs of a micro-batch, which is one forward pass on one rank.
        ranks: how many there are.

    Raises:
        ValueError: where the batch size does not divide the pairs, and where a rank would have no
            micro-batch at all; it names numbers that would do.
    """

    pairs_per_step: int
    batch_size: int
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.pairs_per_step % self.batch_size:
            self._refuse_remainder()
        if self.pairs_per_step < self.ranks:
            raise ValueError(
                f"pairs_per_step={self.pairs_per_step} leaves no pair for some of {self.ranks} "
                f"ranks: give pairs_per_step={self.ranks} or more, or start fewer ranks"
            )
        if self.micro_batches < self.ranks:
            fits = _divisors(self.pairs_per_step, self.pairs_per_step // self.ranks)
            raise ValueError(
                f"batch_size={self.batch_size} leaves no forward pass of a step of "
                f"{self.pairs_per_step} pairs for some of {self.ranks} ranks: give "
                f"batch_size={fits[-1]}, or pairs_per_step={self.batch_size * self.ranks}"
            )

    def _refuse_remainder(self) -> None:
        # The nearest batch sizes that divide the pairs, and the nearest multiples of this one.
        pairs = self.pairs_per_step
        size = self.batch_size
        divisors = _divisors(pairs, pairs)
        sizes = [d for d in divisors if d < size][-1:] + [d for d in divisors if d > size][:1]
        multiples = [n for n in (pairs // size * size, pairs // size * size + size) if n]
        raise ValueError(
            f"batch_size={size} does not divide pairs_per_step={pairs}: "
            f"give batch_size={_either(sizes)}, or pairs_per_step={_either(multiples)}"
        )

    @property
    def micro_batches(self) -> int:
        """Of one step, on all ranks."""
        return self.pairs_per_step // self.batch_size

    @property
    def accumulation(self) -> int:
        """Forward passes of each rank in a step."""
        return -(-self.micro_batches // self.ranks)

    @property
    def spare(self) -> int:
        """Forward passes of a step that do not count, on all ranks."""
        return self.accumulation * self.ranks - self.micro_batches

    def start(self, step: int, turn: int, rank: int) -> int:
        """The place of a micro-batch's first pair in the run.

        Args:
            step: counted from 0.
            turn: of the step, below `accumulation`.
            rank: whose micro-batch it is.
        """
        # A spare one repeats one of the first.
        place = (turn * self.ranks + rank) % self.micro_batches
        return step * self.pairs_per_step + place * self.batch_size

    def weight(self, turn: int, rank: int) -> float:
        """What a micro-batch's loss is multiplied by; 0: it is spare.

        The gradient is the mean over the turns and the ranks. Where some are spare, the others
        count more, so that it is the mean over the pairs of the step.
        """
        if turn * self.ranks + rank >= self.micro_batches:
            return 0.0
        return self.accumulation * self.ranks / self.micro_batches

    def __str__(self) -> str:
        passes = f"{self.accumulation} x {self.batch_size}"
        if self.ranks > 1:
            passes += f" on each of {self.ranks} ranks"
        if self.spare:
            passes += f", {self.spare} of {self.accumulation * self.ranks} spare"
        return passes


def _divisors(number: int, most: int) -> list[int]:
    """The divisors of a number up to `most`, in order."""
    return [d for d in range(1, most + 1) if number % d == 0]


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)
