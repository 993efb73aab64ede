"""A base model in one file is refused in one sentence that says how to convert it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.families import FAMILIES

SDXL = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.weight")
WHOLE = ("first_stage_model.encoder.conv_in.weight", "conditioner.embedders.0.weight")


def write(file, names, dtype=torch.float16):
    save_file({name: torch.zeros(2).to(dtype) for name in names}, file)
    return file


def refusal(source):
    with pytest.raises(ValueError) as caught:
        BaseModel(str(source)).check()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_whole_checkpoint_is_converted_by_its_pipeline(tmp_path):
    file = write(tmp_path / "sd_xl.safetensors", [*SDXL, *WHOLE])
    command = (
        f"from diffusers import StableDiffusionXLPipeline as P; "
        f"P.from_single_file('{file}').save_pretrained('{tmp_path}/sd_xl')"
    )
    message = refusal(file)
    assert command in message
    assert message.endswith(f"and give {tmp_path}/sd_xl")
    compile(command, "command", "exec")

    # A folder that holds nothing else says the same
    assert command in refusal(tmp_path)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "qwen_image", "sana"])
def test_a_denoiser_alone_is_put_into_its_pipeline(name, tmp_path):
    family = FAMILIES[name]
    names = {"sdxl": [label.removeprefix("model.diffusion_model.") for label in SDXL]}
    file = write(tmp_path / "model.safetensors", names.get(name, [f"{family.original_sign}weight"]))
    denoiser = family.denoiser_class
    assert (
        f"from diffusers import {family.pipeline} as P, {denoiser} as D; "
        f"P.from_pretrained('<its pipeline>', {family.denoiser}=D.from_single_file('{file}'))"
    ) in refusal(file)
    assert hasattr(getattr(diffusers, denoiser), "from_single_file")


def test_pickles_and_gguf_are_named_too(tmp_path):
    for ending in ("ckpt", "gguf"):
        file = tmp_path / f"model.{ending}"
        file.write_bytes(b"0")
        assert "is a single file, and a base model is a folder" in refusal(file)


def test_float8_with_scales_is_not_said_to_be_convertible(tmp_path):
    names = [*SDXL, *WHOLE, "model.diffusion_model.out.2.scale_weight"]
    file = write(tmp_path / "scaled.safetensors", names, torch.float8_e4m3fn)
    assert "float8 with scales, which diffusers does not convert" in refusal(file)


@pytest.mark.parametrize("source", ["models/none.safetensors", "org/name/none.safetensors"])
def test_a_file_that_is_not_there_is_not_asked_of_the_hub(source):
    assert refusal(source).startswith(f"there is no file {source}, and a base model is a folder")


def test_an_autoencoder_in_one_file_is_converted(tmp_path):
    file = write(tmp_path / "sdxl_vae.safetensors", ["encoder.conv_in.weight"])
    message = r"AutoencoderKL as A; A\.from_single_file\('.*'\)\.save_pretrained\('.*/sdxl_vae'\)"
    with pytest.raises(ValueError, match=message):
        check_autoencoder(str(file))
