"""What anchors predict: outputs of different meaning are never mixed."""

import copy
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file

from deradiff.anchors.anchor import check_anchor, load_anchor
from deradiff.anchors.predictions import prediction_of
from tests.support.realign_world import BASES

SCHEDULERS = [
    (DDIMScheduler(), "epsilon"),
    (DDIMScheduler(prediction_type="v_prediction"), "v_prediction"),
    (DDIMScheduler(prediction_type="sample"), "sample"),
    (EDMEulerScheduler(), "epsilon"),
    (FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
    (
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        "flow_prediction",
    ),
    (IPNDMScheduler(), None),
]


@pytest.mark.parametrize(("scheduler", "expected"), SCHEDULERS)
def test_a_scheduler_says_what_its_networks_predict(tmp_path, scheduler, expected):
    scheduler.save_pretrained(tmp_path)
    config = type(scheduler).load_config(tmp_path)
    assert prediction_of(config) == expected


def test_an_old_config_means_the_default():
    assert prediction_of({"_class_name": "PNDMScheduler"}) == "epsilon"
    assert prediction_of({"_class_name": "SomebodysScheduler"}) is None


def sd15(prediction):
    """The tiny pipeline with a scheduler of another prediction."""
    pipe = copy.deepcopy(BASES["sd15"])
    config = pipe.scheduler.config
    pipe.scheduler = DDIMScheduler.from_config(config, prediction_type=prediction)
    return pipe


def test_a_pipeline_of_another_prediction_is_refused(tmp_path):
    sd15("v_prediction").save_pretrained(tmp_path)
    message = (
        "predicts v_prediction and the pipeline epsilon, whose outputs cannot be mixed: give an "
        "anchor and a pipeline of one prediction type"
    )
    for source in (tmp_path, tmp_path / "unet"):
        assert load_anchor(source).prediction == "v_prediction"
        with pytest.raises(ValueError, match=message):
            check_anchor(source, sd15("epsilon"))
        assert check_anchor(source, sd15("v_prediction")).method == "full"


def test_a_network_without_a_scheduler_says_nothing(tmp_path):
    sd15("v_prediction").unet.save_pretrained(tmp_path / "unet")
    assert check_anchor(tmp_path, sd15("epsilon")).prediction is None

    # A scheduler in the parent of a folder counts only where that is a pipeline.
    sd15("v_prediction").scheduler.save_pretrained(tmp_path / "scheduler")
    assert load_anchor(tmp_path / "unet").prediction is None
    assert load_anchor(tmp_path).prediction == "v_prediction"


def test_a_lora_beside_a_pipeline_has_the_pipelines_prediction(tmp_path):
    """The network of the anchor is then the user's own, with the LoRA on it."""
    sd15("v_prediction").save_pretrained(tmp_path)
    state = {"unet.x.lora_A.weight": torch.ones(1, 1)}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    assert check_anchor(tmp_path, sd15("epsilon")).prediction is None


@pytest.mark.parametrize(
    ("marker", "metadata", "expected"),
    [
        ({"v_pred": torch.ones(0)}, None, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, None, None),
    ],
)
def test_a_checkpoint_in_one_file_may_say_it(tmp_path, marker, metadata, expected):
    state = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}
    save_file(state | marker, tmp_path / "model.safetensors", metadata)
    assert load_anchor(tmp_path).prediction == expected


def test_the_scheduler_is_found_where_only_it_and_the_network_lie(tmp_path):
    sd15("v_prediction").save_pretrained(tmp_path)
    for folder in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / folder)
    assert load_anchor(tmp_path).prediction == "v_prediction"
