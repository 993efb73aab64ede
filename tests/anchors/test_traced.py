"""Which tensors of a file a converter has used."""

import pytest
import torch

from deradiff.anchors.traced import TracedTensor, plain, traced_state, unused_names


@pytest.fixture
def state():
    """Tensors that know their names."""
    values = {"a": torch.ones(4, 2), "b": torch.ones(4, 2), "alpha": torch.tensor(3.0)}
    return traced_state(values)


CONVERTERS = {
    "renamed": lambda s: [s["a"]],
    "scaled": lambda s: [2 * s["a"].float()],
    "cut": lambda s: list(s["a"].chunk(2)),
    "one part": lambda s: [s["a"][1:]],
    "joined": lambda s: [torch.cat([s["a"], torch.ones(1, 2)])],
    "turned": lambda s: [s["a"].T.contiguous()],
    "in place": lambda s: [s["a"].clone().mul_(2)],
}


@pytest.mark.parametrize("convert", CONVERTERS.values(), ids=CONVERTERS.keys())
def test_what_is_made_of_a_tensor_knows_its_name(state, convert):
    results = convert(state)
    assert unused_names(state, results) == ["b", "alpha"]
    assert type(plain(results[0])) is torch.Tensor


def test_what_is_made_of_several_knows_all(state):
    assert unused_names(state, [state["a"] + state["b"]]) == ["alpha"]
    target = state["a"].clone()
    target[0] = state["b"][0]
    assert unused_names(state, [target]) == ["alpha"]


def test_a_number_that_was_read_was_used(state):
    assert isinstance(state["alpha"], TracedTensor)
    assert unused_names(state, [state["a"] * state["alpha"].item()]) == ["b"]
    assert float(state["alpha"]) == 3


def test_a_summary_is_no_use_of_a_tensor(state):
    assert torch.all(state["b"] == 0).item() is False
    assert state["b"].shape == (4, 2)
    assert unused_names(state, [state["a"]]) == ["b", "alpha"]
