"""`compile=True`: the blocks are compiled once, whatever lambda does, and are plain afterwards."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from deradiff.realignment.compilation import repeated_blocks
from deradiff.realignment.context import realign
from tests.support.realign_world import denoise

ROUNDING = 1e-5


@pytest.fixture
def counter(monkeypatch):
    """Counts compilations; what is compiled runs as it is, so that no C++ is built."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["exact", "reuse", "weights", "sampled"])
@pytest.mark.parametrize("method", ["lora1", "full1"])
def test_lambda_changes_without_compiling_anew(sd15, counter, method, mode):
    anchor = sd15.anchors[method]
    lams = (0.5, 0.25, 0.0, 1.0, 0.75)
    expected = {}
    with realign(sd15.pipe, anchor, 0.5, mode=mode) as dial:
        for lam in lams:
            dial.lam = lam
            expected[lam] = denoise(sd15.pipe.unet)

    with realign(sd15.pipe, anchor, 0.5, mode=mode, memory="high", compile=True) as dial:
        denoise(sd15.pipe.unet)
        compilations = counter.frame_count
        assert compilations > 0
        for lam in lams:
            dial.lam = lam
            output = denoise(sd15.pipe.unet)
            torch.testing.assert_close(output, expected[lam], atol=ROUNDING, rtol=0)
        assert counter.frame_count == compilations


def test_a_lambda_for_each_image_compiles_nothing_anew(sd15, counter):
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, compile=True) as dial:
        denoise(sd15.pipe.unet)
        compilations = counter.frame_count
        dial.lam = torch.tensor([0.1, 0.9])
        denoise(sd15.pipe.unet)
        assert counter.frame_count == compilations


def test_the_blocks_are_plain_afterwards_and_the_users_stay_compiled(sd15, counter):
    blocks = repeated_blocks(sd15.pipe.unet)
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
    blocks[0].compile()
    users = blocks[0]._compiled_call_impl
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, compile=True):
        assert all(block._compiled_call_impl is not None for block in blocks)
        assert blocks[0]._compiled_call_impl is users
    assert blocks[0]._compiled_call_impl is users
    assert all(block._compiled_call_impl is None for block in blocks[1:])


def test_blocks_are_found_in_every_family(world):
    names = {type(block).__name__ for block in repeated_blocks(world.denoiser)}
    assert all("Block" in name for name in names)


def test_what_cannot_be_compiled_is_refused(sd15):
    with pytest.raises(ValueError, match="no blocks repeat in a Linear"):
        repeated_blocks(nn.Linear(1, 1))
    with (
        pytest.raises(ValueError, match="batched=True and compile=True do not go together"),
        realign(sd15.pipe, sd15.anchors["lora1"], 0.5, batched=True, compile=True),
    ):
        pass
