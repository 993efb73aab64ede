"""Recorded passes: what a recording depends on is looked at each time.

There is no GPU here. A stand-in records a pass as a GPU would: it keeps the memory of arguments,
weights and settings as they are, and computes from them again.
"""

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from deradiff import realign
from deradiff.models import cuda_graphs
from deradiff.models.cuda_graphs import (
    NotRecordedWarning,
    RecordedTraining,
    Recording,
    Recordings,
    check_without_dropout,
    enable_gradient_checkpointing,
)


class StandIn:
    """Records passes on the CPU, and counts them."""

    def __init__(self):
        self.recorded = 0
        self.replayed = 0

    def record(self, forward, leaves, structure, pool):
        self.recorded += 1
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, structure)
        outputs, output_structure = tree_flatten(forward(*args, **kwargs))

        def replay():
            self.replayed += 1
            again, _ = tree_flatten(forward(*args, **kwargs))
            for own, new in zip(outputs, again):
                own.copy_(new)

        return Recording(inputs, outputs, output_structure, replay)


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in for CUDA graphs."""
    made = StandIn()
    monkeypatch.setattr(cuda_graphs, "record", made.record)
    monkeypatch.setattr(cuda_graphs, "is_plain_tensor", lambda value: type(value) is torch.Tensor)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


class Processor:
    """What computes a part of a network, as attention processors of diffusers do."""

    def __init__(self, scale=1.0):
        self.scale = scale
        self.scales = [1.0]

    def __call__(self, x):
        return x * self.scale * self.scales[0]


class Scaled(nn.Module):
    """A network with a weight, a setting and a processor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = 1.0
        self.processor = Processor()

    def forward(self, x, factor=1.0, more=None):
        shift = 0 if more is None else more["shift"]
        return (self.processor(self.layer(x)) * self.scale * factor + shift,)


@torch.no_grad()
def test_a_pass_runs_is_recorded_and_is_replayed_from_then_on(stand_in):
    network = Scaled()
    recordings = Recordings(network)
    for _ in range(5):
        x = torch.randn(2, 3)
        more = {"shift": torch.randn(2, 3)}
        (output,) = recordings.run(network.forward, x, more=more)
        assert torch.equal(output, network(x, more=more)[0])
    assert stand_in.recorded == 1
    assert stand_in.replayed == 4


@torch.no_grad()
def test_an_output_stays_when_the_next_pass_is_replayed(stand_in):
    network = Scaled()
    recordings = Recordings(network)
    inputs = [torch.randn(2, 3) for _ in range(4)]
    outputs = [recordings.run(network.forward, x)[0] for x in inputs]
    for x, output in zip(inputs, outputs):
        assert torch.equal(output, network(x)[0])


CHANGES = {
    "a weight of other memory": lambda n: setattr(n.layer, "bias", nn.Parameter(torch.ones(3))),
    "a setting": lambda n: setattr(n, "scale", 2.0),
    "a list of numbers": lambda n: setattr(n, "scales", [0.5]),
    "training mode": lambda n: n.train(not n.training),
    "a setting of the processor": lambda n: setattr(n.processor, "scale", 0.5),
    "a list of the processor's": lambda n: n.processor.scales.__setitem__(0, 0.5),
    "another processor": lambda n: setattr(n, "processor", Processor(0.5)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_recorded_anew(stand_in, change):
    network = Scaled()
    recordings = Recordings(network)
    x = torch.randn(2, 3)
    for _ in range(3):
        recordings.run(network.forward, x)
    CHANGES[change](network)
    for _ in range(3):
        assert torch.equal(recordings.run(network.forward, x)[0], network(x)[0])
    assert stand_in.recorded == 2


@torch.no_grad()
def test_other_shapes_and_other_numbers_are_other_passes(stand_in):
    network = Scaled()
    recordings = Recordings(network)
    for rows, factor in [(2, 1.0), (2, 1.0), (3, 1.0), (3, 1.0), (2, 2.0), (2, 2.0)]:
        x = torch.randn(rows, 3)
        output = recordings.run(network.forward, x, factor=factor)[0]
        assert torch.equal(output, network(x, factor=factor)[0])
    assert stand_in.recorded == 3


@torch.no_grad()
def test_a_weight_that_is_written_into_needs_no_new_recording(stand_in):
    network = Scaled()
    recordings = Recordings(network)
    x = torch.randn(2, 3)
    for _ in range(4):
        assert torch.equal(recordings.run(network.forward, x)[0], network(x)[0])
        network.layer.weight.add_(1)
    assert stand_in.recorded == 1


def test_gradients_hooks_and_objects_are_not_recorded(stand_in):
    network = Scaled()
    x = torch.randn(2, 3)
    recordings = Recordings(network)
    for _ in range(3):
        assert recordings.run(network.forward, x)[0].requires_grad
    with torch.no_grad():
        for _ in range(3):
            recordings.run(network.forward, x, more={"shift": 1, "memory": object()})
        network.layer.register_forward_hook(lambda *args: None)
        recordings.refresh()
        for _ in range(3):
            recordings.run(network.forward, x)
    assert stand_in.recorded == 0


@torch.no_grad()
def test_what_cannot_be_recorded_is_said_once_and_runs(stand_in, monkeypatch):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "record", fail)
    network = Scaled()
    recordings = Recordings(network)
    x = torch.randn(2, 3)
    recordings.run(network.forward, x)
    with pytest.warns(NotRecordedWarning, match="Scaled cannot be recorded.*is capturing"):
        assert torch.equal(recordings.run(network.forward, x)[0], network(x)[0])
    for _ in range(2):
        assert torch.equal(recordings.run(network.forward, x)[0], network(x)[0])


# In the dial


def called(pipe, seed=0):
    """An image of the tiny pipeline."""
    generator = torch.Generator().manual_seed(seed)
    return pipe("a red fox", num_inference_steps=4, generator=generator, output_type="np").images


@pytest.mark.parametrize("mode", ["exact", "reuse", "weights"])
@pytest.mark.parametrize("name", ["lora1", "full1"])
def test_the_dial_gives_the_same_images_from_recordings(sd15, stand_in, monkeypatch, mode, name):
    # Compiled code rounds otherwise; here the recordings alone are compared.
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    anchor = sd15.anchors[name]
    expected = []
    with realign(sd15.pipe, anchor, 0.5, mode=mode, memory="high") as dial:
        for lam in (0.5, 0.25, 1.0, 0.0):
            dial.lam = lam
            expected.append(called(sd15.pipe))
    with realign(sd15.pipe, anchor, 0.5, mode=mode, memory="high", compile=True) as dial:
        for lam, image in zip((0.5, 0.25, 1.0, 0.0), expected):
            dial.lam = lam
            assert abs(called(sd15.pipe) - image).max() < 1e-4
    assert stand_in.replayed > 8


def test_a_lora_beside_the_network_is_not_taken_for_the_reference(sd15, stand_in, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    anchor = sd15.anchors["lora1"]
    with realign(sd15.pipe, anchor, 0.5, memory="low"):
        expected = called(sd15.pipe)
    with realign(sd15.pipe, anchor, 0.5, memory="low", compile=True):
        assert abs(called(sd15.pipe) - expected).max() < 1e-4
    assert stand_in.replayed > 0


def test_a_new_lambda_records_nothing_where_two_networks_are_mixed(sd15, stand_in, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    with realign(sd15.pipe, sd15.anchors["full1"], 0.5, compile=True) as dial:
        called(sd15.pipe)
        recorded = stand_in.recorded
        for lam in (0.25, 0.75, torch.tensor([0.3])):
            dial.lam = lam
            called(sd15.pipe)
    assert recorded == 2
    assert stand_in.recorded == recorded


# In training


def test_a_training_pass_is_recorded_in_the_block_alone_and_accelerate_wraps_it(
    stand_in, monkeypatch
):
    made = []

    def make_graphed_callables(module, samples, **options):
        assert not torch.is_autocast_cache_enabled() or not torch.is_autocast_enabled("cuda")
        assert options["allow_unused_input"]
        made.append(samples)
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    network = Scaled()
    recorded = RecordedTraining(network)
    prepared = Accelerator(cpu=True).prepare(network)
    x = torch.randn(2, 3)
    expected = Scaled.forward(network, x, factor=2.0)[0]
    assert torch.equal(prepared(x, factor=2.0)[0], expected)
    assert not made

    with recorded.active():
        for _ in range(2):
            output = prepared(x, factor=2.0)[0]
            assert torch.equal(output, expected)
        output.sum().backward()
        assert len(made) == 1
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(prepared(x, factor=2.0)[0], expected)
        assert stand_in.recorded == 1
    # The gradients that the recording adds to were there before.
    assert all(parameter.grad is not None for parameter in network.parameters())

    recorded.release()
    with recorded.active():
        assert torch.equal(prepared(x, factor=2.0)[0], expected)
    assert len(made) == 1


def test_dropout_is_refused_and_checkpointing_keeps_no_random_numbers_without_it():
    with pytest.raises(ValueError, match=r"1 drops out a share of 0.1 .* remove compile"):
        check_without_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    check_without_dropout(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_checkpointed_gradients_are_those_without(sd15, share, monkeypatch):
    draws = []
    whole = cuda_graphs.checkpoint

    def noted(block, *args, preserve_rng_state, **kwargs):
        draws.append(preserve_rng_state)
        return whole(block, *args, preserve_rng_state=preserve_rng_state, **kwargs)

    monkeypatch.setattr(cuda_graphs, "checkpoint", noted)
    unet = sd15.pipe.unet.train()
    dropout = next(module for module in unet.modules() if isinstance(module, nn.Dropout))
    monkeypatch.setattr(dropout, "p", share)
    x = torch.randn(1, 4, 8, 8)
    text = torch.randn(1, 77, unet.config.cross_attention_dim)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            enable_gradient_checkpointing(unet)
        torch.manual_seed(0)
        loss = unet(x, 3, text).sample.square().mean()
        (gradient,) = torch.autograd.grad(loss, [unet.conv_in.weight])
        gradients.append(gradient)
    unet.disable_gradient_checkpointing()
    unet.eval()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert set(draws) == {share > 0}
