"""What users do with a pipeline besides calling it: moving, saving, offloading and compiling work
inside the context as usual."""

import itertools

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from safetensors.torch import load_file

from deradiff.realignment.context import realign
from tests.support.realign_world import BASES, STEPS, denoise, fingerprint, sample

METHODS = pytest.mark.parametrize("method", ["full1", "lora1"])


def copied_state(network):
    """The weights, which later changes of the network do not change."""
    return {name: p.clone() for name, p in network.state_dict().items()}


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], p) for name, p in expected.items())


@METHODS
def test_what_is_saved_inside_is_the_reference(world, method, tmp_path):
    weights = world.pipe.unet.state_dict()
    with realign(world.pipe, world.anchors[method], 0.5):
        world.pipe.save_pretrained(tmp_path)
        inside = world.pipe.unet.state_dict()
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same_state(saved, weights)
    assert_same_state(inside, weights)


def test_a_users_own_lora_is_saved_as_it_would_be_outside(sd15):
    sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
    before = sd15.pipe.unet.state_dict()
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        assert sd15.pipe.unet.state_dict().keys() == before.keys()


@METHODS
@pytest.mark.parametrize(
    "offload", [cpu_offload, cpu_offload_with_hook], ids=["sequential", "whole"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_offloading_before_and_inside(sd15, method, offload, inside):
    if inside and offload is cpu_offload and method == "lora1":
        pytest.skip(
            "a LoRA renames the layers that accelerate keeps elsewhere: `realign` says to switch "
            "on sequential offloading before"
        )
    plain = sd15.copy()
    with realign(plain.pipe, sd15.anchors[method], 0.5):
        expected = sample(plain.pipe)

    # diffusers calls these around loading a LoRA. Their own form needs a GPU.
    for name in ("enable_sequential_cpu_offload", "enable_model_cpu_offload"):
        setattr(sd15.pipe, name, lambda: offload(sd15.pipe.unet, "cpu"))
    if not inside:
        offload(sd15.pipe.unet, "cpu")
    with realign(sd15.pipe, sd15.anchors[method], 0.5):
        if inside:
            offload(sd15.pipe.unet, "cpu")
        assert torch.equal(sample(sd15.pipe), expected)
    assert torch.equal(sample(sd15.pipe), sample(BASES["sd15"]))
    assert hasattr(sd15.pipe.unet, "_hf_hook"), "the offloading goes on"


def compiled_cases():
    """(method, how it is compiled); of which one block alone is quick."""
    yield "full1", "one block"
    for method, how in itertools.product(["full1", "lora1"], ["blocks", "wrapped", "in place"]):
        yield pytest.param(method, how, marks=[pytest.mark.slow])


def compile_unet(pipe, how):
    """Compile the pipeline's UNet in one of the ways that users do it.

    With dynamo's eager backend the network is captured and guarded as with any other, and no C++ is
    built.
    """
    unet = pipe.unet
    if how == "wrapped":
        pipe.unet = torch.compile(unet, backend="eager")
    elif how == "in place":
        unet.compile(backend="eager")
    elif how == "one block":
        unet.mid_block.compile(backend="eager")
    else:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.compile(backend="eager")


@pytest.mark.parametrize(("method", "how"), compiled_cases())
def test_compiled_networks_are_realigned(sd15, method, how):
    torch._dynamo.reset()
    plain = sd15.copy()
    expected = {}
    with realign(plain.pipe, sd15.anchors[method], 0.5) as dial:
        for lam in (0.5, 0.0, 1.0):
            dial.lam = lam
            expected[lam] = denoise(plain.pipe.unet)

    unet = sd15.pipe.unet
    compile_unet(sd15.pipe, how)
    before = denoise(sd15.pipe.unet)
    with realign(sd15.pipe, sd15.anchors[method], 0.5) as dial:
        for lam in (0.5, 0.0, 1.0):
            dial.lam = lam
            torch.testing.assert_close(denoise(sd15.pipe.unet), expected[lam], atol=1e-5, rtol=0)
        dial.lam = 0.5
        assert sample(sd15.pipe).shape == (2, 4, 8, 8)
        assert len(sd15.pipe.scheduler.timesteps) == STEPS
    torch.testing.assert_close(denoise(sd15.pipe.unet), before, atol=1e-6, rtol=0)
    if how == "in place":
        assert unet._compiled_call_impl is not None


def test_rows_as_one_batch_and_compiled_blocks_are_refused(sd15):
    for block in sd15.pipe.unet.up_blocks:
        block.compile(backend="eager")
    before = fingerprint(sd15.pipe.unet)
    with (
        pytest.raises(ValueError, match="do not go together"),
        realign(sd15.pipe, sd15.anchors["lora1"], 0.5, batched=True),
    ):
        pass
    assert fingerprint(sd15.pipe.unet) == before


def test_moving_inside_takes_the_second_network_along(sd15):
    x = torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    text = torch.zeros(1, 5, 32, dtype=torch.float64)
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5), torch.no_grad():
        sd15.pipe.to(torch.float64)
        assert sd15.pipe.unet(x, 5, text).sample.dtype == torch.float64


def test_moving_inside_takes_a_lora_along(sd15):
    stock = sd15.stock("lora1").to(torch.bfloat16)
    with realign(sd15.pipe, sd15.anchors["lora1"], 1):
        sd15.pipe.to(torch.bfloat16)
        assert torch.equal(denoise(sd15.pipe.unet), denoise(stock.unet))


def test_a_lora_that_is_loaded_inside_is_refused_where_it_would_act_in_one_network_alone(sd15):
    with realign(sd15.pipe, sd15.anchors["lora1"], 0.5):
        sd15.pipe.load_lora_weights(sd15.anchors["lora2"], adapter_name="style")
        with pytest.raises(ValueError, match="load it before"):
            denoise(sd15.pipe.unet)


@METHODS
def test_in_the_middle_of_a_chain_of_summed_weights_the_reference_is_saved_moved_and_given_back(
    sd15, method
):
    """Mode weights leaves the sum in place between a chain's steps. What a step callback saves is
    the reference all the same."""
    weights = copied_state(sd15.pipe.unet)
    saved = []

    def save(pipe, step, t, values):
        saved.append(copied_state(pipe.unet))
        return values

    def stop(pipe, step, t, values):
        pipe._interrupt = True
        return values

    with realign(sd15.pipe, sd15.anchors[method], 0.5, mode="weights"):
        expected = sample(sd15.pipe)
        assert torch.equal(sample(sd15.pipe, callback_on_step_end=save), expected)
        assert len(saved) == STEPS
        for state in saved:
            assert_same_state(state, weights)

        # A chain that is interrupted, and a pipeline that is moved before the context is left.
        sample(sd15.pipe, callback_on_step_end=stop)
        sd15.pipe.to(torch.float64)
    for name, p in sd15.pipe.unet.state_dict().items():
        assert p.dtype == torch.float64
        assert torch.equal(p, weights[name].double())
