"""The dial on networks that torchao has quantised; where the package is there."""

import pytest
import torch

from deradiff.realignment.context import realign
from tests.support.realign_world import sample

quantization = pytest.importorskip("torchao.quantization", reason="pip install torchao")


@pytest.fixture
def quantised(worlds):
    """SD1.5 with int8 weights."""
    world = worlds["sd15"].copy()
    quantization.quantize_(world.denoiser, quantization.Int8WeightOnlyConfig())
    return world


@pytest.mark.parametrize("memory", ["low", "high"])
@pytest.mark.parametrize("mode", ["exact", "reuse", "sampled"])
def test_a_lora_is_dialled_on_int8_weights(quantised, mode, memory):
    pipe, anchor = quantised.pipe, quantised.anchors["lora1"]
    reference = sample(pipe)
    with realign(pipe, anchor, 1, mode=mode, memory=memory) as dial:
        anchored = sample(pipe)
        dial.lam = 0.5
        middle = sample(pipe)
        dial.lam = 0
        assert torch.equal(sample(pipe), reference)
    pipe.load_lora_weights(anchor)
    assert torch.equal(sample(pipe), anchored)
    assert not torch.equal(middle, reference)
    assert not torch.equal(middle, anchored)


@pytest.mark.parametrize(
    ("anchor", "mode", "message"),
    [("lora1", "weights", "use mode='exact'"), ("full1", "exact", "give a LoRA anchor")],
)
def test_what_would_need_plain_weights_is_refused(quantised, anchor, mode, message):
    with (
        pytest.raises(ValueError, match=message),
        realign(quantised.pipe, quantised.anchors[anchor], 0.5, mode=mode),
    ):
        sample(quantised.pipe)
