"""The panel of a training run: its images, and which warnings it passes on."""

import warnings

import pytest

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.realignment.dial import BeyondAnchorWarning
from deradiff.training.lending import is_lendable, lent_reference
from deradiff.training.panel import encode_prompts, sample_panel
from tests.support.tiny_pipelines import tiny_lora, tiny_pipeline


@pytest.fixture
def anchor(tmp_path):
    """A LoRA of the tiny SD1.5."""
    network = tiny_lora(tiny_pipeline("sd15").unet)
    save_anchor(tmp_path, network, AnchorCard(base_model="x", family="sd15", method="lora", beta=1))
    return load_anchor(tmp_path)


def panel_of(pipe, anchor, lambdas):
    """A small panel of one prompt, whose pipeline has lost its text encoder."""
    rows = encode_prompts(pipe, ["a fox"], 3.0)
    pipe.text_encoder = None
    options = {"resolution": 64, "steps": 1, "guidance_scale": 3.0}
    return sample_panel(pipe, anchor, ["a fox"], rows, lambdas, **options)


def test_a_network_in_training_is_lent_as_the_reference(anchor):
    """As accelerate and `compile=true` leave it: cast, compiled and in training."""
    expected = panel_of(tiny_pipeline("sd15"), anchor, [0.0, 1.0])

    network = tiny_lora(tiny_pipeline("sd15").unet, seed=3)
    network.train()
    network.forward = lambda *_, **__: pytest.fail("the forward of training")
    block = network.up_blocks[0]
    block.compile(backend=lambda *_: pytest.fail("a compiled block"))
    compiled = block._compiled_call_impl
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = [name for name, p in network.named_parameters() if p.requires_grad]

    assert is_lendable(network)
    with lent_reference(network) as lent:
        pipe = tiny_pipeline("sd15")
        pipe.register_modules(unet=lent)
        sheet = panel_of(pipe, anchor, [0.0, 1.0])
    assert sheet.tobytes() == expected.tobytes()

    # Training goes on where it was.
    assert network.training
    assert "forward" in vars(network)
    assert block._compiled_call_impl is compiled
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert [name for name, p in network.named_parameters() if p.requires_grad] == trained
    layers = [module for module in network.modules() if hasattr(module, "lora_A")]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)


def test_what_holds_no_reference_is_not_lent():
    network = tiny_pipeline("sd15").unet
    assert not is_lendable(network)
    assert not is_lendable(tiny_lora(network).to("meta"))


def test_a_panel_ignores_the_warning_that_it_asks_for_and_no_other(anchor):
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)

    def warn(*_):
        warnings.warn("of the network", RuntimeWarning, stacklevel=1)

    pipe.unet.register_forward_hook(warn)
    with pytest.warns(RuntimeWarning, match="of the network") as records:
        sheet = panel_of(pipe, anchor, [2.0, 3.0])
    assert sheet.size == (2 * 96, 14 + 96 + 14)
    assert not [record for record in records if record.category is BeyondAnchorWarning]
