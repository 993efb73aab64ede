"""The pairs of a step are the same on any number of ranks, and each of them counts once."""

import pytest

from deradiff.training.shares import Shares


def counted(shares, step):
    """The places of the pairs that count in a step, over all ranks in turns."""
    places = []
    for turn in range(shares.accumulation):
        for rank in range(shares.ranks):
            start = shares.start(step, turn, rank)
            if shares.weight(turn, rank):
                places += range(start, start + shares.batch_size)
    return places


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 7, 16, 56, 64])
def test_any_number_of_ranks_takes_the_same_pairs_in_the_same_micro_batches(batch_size, ranks):
    shares = Shares(256, batch_size, ranks)
    assert counted(shares, step=3) == list(range(3 * 256, 4 * 256))


@pytest.mark.parametrize("ranks", [1, 3, 8, 56])
def test_the_mean_over_turns_and_ranks_is_that_over_the_pairs(ranks):
    shares = Shares(2048, 4, ranks)
    weights = []
    for rank in range(ranks):
        weights += [shares.weight(turn, rank) for turn in range(shares.accumulation)]
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert len(set(weights) - {0.0}) == 1
    assert weights.count(0.0) == shares.spare


def test_where_they_come_out_even_nothing_is_weighted_and_nothing_is_spare():
    shares = Shares(2048, 1, 16)
    assert (shares.accumulation, shares.spare, shares.weight(127, 15)) == (128, 0, 1.0)
    assert str(shares) == "128 x 1 on each of 16 ranks"
    assert str(Shares(2048, 4, 56)).endswith("10 x 4 on each of 56 ranks, 48 of 560 spare")


@pytest.mark.parametrize(
    "numbers, message",
    [
        (
            (2048, 3),
            "batch_size=3 does not divide pairs_per_step=2048: give batch_size=2 or 4, "
            "or pairs_per_step=2046 or 2049",
        ),
        (
            (16, 32),
            "batch_size=32 does not divide pairs_per_step=16: give batch_size=16, "
            "or pairs_per_step=32",
        ),
        ((16, 16, 2), "for some of 2 ranks: give batch_size=8, or pairs_per_step=32"),
        ((96, 48, 5), "for some of 5 ranks: give batch_size=16, or pairs_per_step=240"),
        ((4, 1, 8), "give pairs_per_step=8 or more, or start fewer ranks"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_numbers_that_can(numbers, message):
    with pytest.raises(ValueError) as refused:
        Shares(*numbers)
    assert message in str(refused.value)
