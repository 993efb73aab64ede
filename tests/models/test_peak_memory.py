"""The memory of an evaluation at its peak, against what torch allocates, and by hand."""

import pytest
import torch
from diffusers import AutoencoderKL

from deradiff.models.families import FAMILIES
from deradiff.models.peak_memory import PeakMemory, decoding_bytes, encoding_bytes
from tests.support.tiny_pipelines import tiny_pipeline


def test_tensors_count_while_they_are_alive():
    with PeakMemory() as memory:
        first = torch.empty(100, device="meta")
        view = first[:50].view(5, 10)
        second = first + 1
        assert memory.alive == 800
        del first
        assert memory.alive == 800, "a view keeps what it is a view of"
        del view
        assert memory.alive == 400
        second.add_(1)
        assert memory.alive == 400
        del second
    assert memory.alive == 0
    assert memory.peak == 800


def test_what_exists_before_counts_for_nothing():
    weight = torch.empty(100, device="meta")
    with PeakMemory() as memory:
        part = weight[:10]
        total = part + 1
    assert memory.alive == total.untyped_storage().nbytes() == 40


def test_what_autograd_alone_holds_counts():
    weight = torch.ones(100, device="meta", requires_grad=True)
    with PeakMemory() as memory:
        result = weight.exp().sum()
        assert memory.alive == 404, "the exponential is kept for its own backward"
        result.backward()
        del result
        assert memory.alive == 400, "the gradient"


def test_sdxls_autoencoder_needs_what_was_measured():
    """86.5 GB for 64 images of 1024 pixels in half precision, on an H200."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=32,
        ).type(torch.float16)
    assert encoding_bytes(FAMILIES["sdxl"], vae, 1024, 64) == pytest.approx(86.5e9, rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_encoding_is_counted(name):
    vae = tiny_pipeline(name).vae.to("meta")
    one, two, four = (encoding_bytes(FAMILIES[name], vae, 64, count) for count in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one))
    decoded = decoding_bytes(FAMILIES[name], vae, 64)
    assert decoded > 4 * 3 * 64**2
