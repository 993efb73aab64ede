"""Where a pipeline keeps its denoiser, whatever its family."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import PriorTransformer, SanaTransformer2DModel, UNet2DConditionModel

from deradiff.models.pipelines import (
    denoiser_name,
    denoiser_names,
    known_family,
    pipeline_label,
)
from tests.support.many_pipelines import bare_pipeline
from tests.support.tiny_pipelines import tiny_pipeline


@pytest.fixture(autouse=True)
def without_weights():
    """Networks on the device "meta": their classes are all that counts here."""
    with torch.device("meta"):
        yield


def test_the_network_of_diffusers_is_the_denoiser():
    transformer = SanaTransformer2DModel(num_layers=1)
    assert denoiser_name(SimpleNamespace(unet=None, transformer=transformer)) == "transformer"
    prior = PriorTransformer(num_layers=1)
    assert denoiser_name(SimpleNamespace(prior=prior, decoder=torch.nn.Linear(1, 1))) == "prior"


def test_a_wrapped_network_is_one_too():
    wrapped = SimpleNamespace(module=UNet2DConditionModel())
    assert denoiser_name(SimpleNamespace(unet=wrapped)) == "unet"


def test_all_denoisers_are_listed():
    transformer = SanaTransformer2DModel(num_layers=1)
    pipe = SimpleNamespace(transformer=transformer, transformer_2=transformer)
    assert denoiser_names(pipe) == ["transformer", "transformer_2"]
    pipe.transformer_2 = None
    assert denoiser_names(pipe) == ["transformer"]


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(ValueError, match="unet, transformer, prior or decoder: give a pipeline"):
        denoiser_name(SimpleNamespace(unet=None))


def test_a_pipeline_is_named_by_its_family_or_else_by_its_class():
    with torch.device("cpu"):
        known = tiny_pipeline("sd15")
        other = bare_pipeline("wan")
    assert known_family(known).name == pipeline_label(known) == "sd15"
    assert known_family(other) is None
    assert pipeline_label(other) == "Wan"
