"""The panel of a training run: its images, and which warnings it passes on."""

import warnings

import pytest

from deradiff.anchors.anchor import AnchorCard, load_anchor, save_anchor
from deradiff.realignment.dial import BeyondAnchorWarning
from deradiff.training.panel import sample_panel
from tests.support.tiny_pipelines import tiny_lora, tiny_pipeline


@pytest.fixture
def anchor(tmp_path):
    """A LoRA of the tiny SD1.5."""
    network = tiny_lora(tiny_pipeline("sd15").unet)
    save_anchor(tmp_path, network, AnchorCard(base_model="x", family="sd15", method="lora", beta=1))
    return load_anchor(tmp_path)


def test_a_panel_ignores_the_warning_that_it_asks_for_and_no_other(anchor):
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)

    def warn(*_):
        warnings.warn("of the network", RuntimeWarning, stacklevel=1)

    pipe.unet.register_forward_hook(warn)
    with pytest.warns(RuntimeWarning, match="of the network") as records:
        sheet = sample_panel(pipe, anchor, ["a fox"], [2.0, 3.0], resolution=64, steps=1)
    assert sheet.size == (2 * 96, 14 + 96 + 14)
    assert not [record for record in records if record.category is BeyondAnchorWarning]
