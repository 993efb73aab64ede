"""What a newcomer forgot: everything that a family has to bring along, and whether it fits.

How to add a family is written at the top of `deradiff/models/family.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from torch.utils._pytree import tree_leaves

import deradiff.models
from deradiff.method.samplers import SAMPLERS
from deradiff.models.base_model import BaseModel
from deradiff.models.families import (
    FAMILIES,
    family_of_config,
    family_of_original,
)
from deradiff.models.family import Family
from deradiff.models.flops import denoiser_inputs, meta_denoiser
from tests.support.tiny_pipelines import SIDE, TINY, save_tiny, tiny_denoiser, tiny_pipeline

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("deradiff", "train", "sample", "eval", "configs")
RECIPES = ("lora", "full")
HEAVY = ("torch", "diffusers", "transformers")

BESIDE = {"flux2": ["guidance_in.in_layer.weight"]}
"""Names in the original layout that tell a family from another one with the same sign."""

every_family = pytest.mark.parametrize("name", FAMILIES)


def modules_of_families():
    for module in pkgutil.iter_modules(deradiff.models.__path__):
        yield importlib.import_module(f"deradiff.models.{module.name}")


def saved_config(name):
    """A denoiser's config as its `config.json` has it."""
    return {"_class_name": FAMILIES[name].denoiser_class, **tiny_denoiser(name).config}


def test_every_family_of_a_file_is_in_the_registry():
    found = set()
    for module in modules_of_families():
        for value in vars(module).values():
            if isinstance(value, Family):
                found.add(value.name)
    assert found == set(FAMILIES), "add the instance to deradiff.models.families.FAMILIES"


@every_family
def test_it_has_a_row_in_the_tiny_pipelines(name):
    assert name in TINY, "add a row to TINY in tests/support/tiny_pipelines.py"


@every_family
def test_it_has_a_config_that_names_its_base_model(name):
    file = ROOT / "configs" / "model" / f"{name}.yaml"
    assert file.is_file(), f"add configs/model/{name}.yaml"
    config = yaml.safe_load(file.read_text())
    assert config["name"] == name
    assert config["base"].count("/") == 1
    assert config["resolution"] % FAMILIES[name].multiple == 0


@every_family
@pytest.mark.parametrize("method", RECIPES)
def test_it_has_settings_of_the_optimiser(name, method):
    file = ROOT / "configs" / "optim" / f"{name}_{method}.yaml"
    assert file.is_file(), f"add configs/optim/{name}_{method}.yaml"


@every_family
def test_its_classes_are_diffusers_and_its_sampler_is_of_its_kind(name):
    family = FAMILIES[name]
    for class_name in (family.pipeline, family.denoiser_class, family.autoencoder_class):
        assert hasattr(diffusers, class_name)
    assert SAMPLERS[family.sampling.sampler].flow == family.flow


@every_family
def test_its_lora_layers_are_in_its_denoiser(name):
    layers = [layer for layer, _ in tiny_denoiser(name).named_modules()]
    for target in FAMILIES[name].lora_targets:
        assert any(layer.endswith(f".{target}") for layer in layers), target


@every_family
def test_its_denoiser_and_its_original_layout_are_told_from_all_others(name):
    config = saved_config(name)
    owners = [family.name for family in FAMILIES.values() if family.owns_config(config)]
    assert owners == [name]
    assert family_of_config(config) is FAMILIES[name]
    original = [f"{FAMILIES[name].original_sign}0.weight", *BESIDE.get(name, [])]
    assert family_of_original(original) is FAMILIES[name]


@every_family
def test_a_prompt_has_the_rows_and_tokens_that_it_says(name):
    family = FAMILIES[name]
    pipe = tiny_pipeline(name)
    with torch.no_grad():
        rows = family.encode_prompts(pipe, ["a cat"])
    shapes = family.prompt_shapes(getattr(pipe, family.denoiser).config, family.prompt_tokens)
    assert {key: tuple(value.shape) for key, value in rows.items()} == shapes


@every_family
def test_its_denoiser_takes_the_inputs_that_it_says(name):
    family = FAMILIES[name]
    network = meta_denoiser(saved_config(name))
    inputs = denoiser_inputs(network.config, SIDE, SIDE, tokens=20)
    accepted = inspect.signature(network.forward).parameters
    assert set(inputs) <= set(accepted)
    assert {family.latents_argument, *family.shared_arguments} <= set(inputs)
    with torch.no_grad():
        output = network(**inputs, return_dict=False)[0]
    shapes = [tensor.shape for tensor in tree_leaves(inputs[family.latents_argument])]
    assert [tensor.shape for tensor in tree_leaves(output)] == shapes


@every_family
def test_its_patches_are_those_of_its_denoisers_input(name):
    family = FAMILIES[name]
    config = tiny_denoiser(name).config
    shape = family.input_shapes(config, SIDE, SIDE, tokens=20)[family.latents_argument]
    is_packed = len(shape) == 3
    assert is_packed == (family.patch_size > 1)
    if is_packed:
        assert shape[1] == (SIDE // family.patch_size) ** 2


@every_family
def test_the_embeddings_of_a_prompt_are_arguments_of_its_pipelines_call(name):
    pipe = tiny_pipeline(name)
    accepted = inspect.signature(type(pipe).__call__).parameters
    for guided in (False, True):
        arguments = FAMILIES[name].call_arguments(pipe, ["a cat", "two dogs"], guided)
        assert set(arguments) <= set(accepted)
        assert {len(rows) for rows in arguments.values()} == {2}


@every_family
def test_its_latents_are_what_its_pipeline_decodes(name):
    """Encoded latents, given to the pipeline as those of its last step, become what the autoencoder
    makes of an image: shift and scale of both are the same.
    """
    family = FAMILIES[name]
    pipe = tiny_pipeline(name)
    images = torch.rand(2, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(0))
    decoded = []
    own_decode = pipe.vae.decode

    def decode(latents, *args, **kwargs):
        decoded.append(latents)
        return own_decode(latents, *args, **kwargs)

    with torch.no_grad():
        latents = family.encode_images(pipe.vae, 2 * images - 1)
    assert latents.shape == (2, *family.latent_shape(pipe, 8 * SIDE))
    pipe.vae.decode = decode
    pipe.scheduler.step = lambda *_, **__: (in_its_layout(pipe, latents),)
    pipe(
        prompt=["a cat", "two dogs"],
        height=8 * SIDE,
        width=8 * SIDE,
        num_inference_steps=1,
        output_type="pt",
        **dict(family.call_options),
    )
    torch.testing.assert_close(decoded[0].reshape(-1), mean_of(pipe.vae, images).reshape(-1))


def mean_of(vae, images):
    """The posterior's mean, which is what an autoencoder decodes."""
    pixels = 2 * images - 1
    if "Qwen" in type(vae).__name__:
        pixels = pixels.unsqueeze(2)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()


def in_its_layout(pipe, latents):
    """Latents as the pipeline keeps them between its steps."""
    if hasattr(pipe, "_patchify_latents"):
        return pipe._pack_latents(pipe._patchify_latents(latents))
    if hasattr(pipe, "_pack_latents"):
        return type(pipe)._pack_latents(latents, *latents.shape)
    return latents


@every_family
def test_its_base_model_describes_an_autoencoder_without_weights(name, tmp_path):
    base = BaseModel(str(save_tiny(name, tmp_path)))
    described = base.describe_vae(torch.bfloat16)
    real = base.load_vae(torch.bfloat16)
    assert type(described) is type(real)
    ours = {key: value for key, value in described.config.items() if not key.startswith("_")}
    assert ours == {key: real.config[key] for key in ours}
    assert {parameter.device.type for parameter in described.parameters()} == {"meta"}
    assert described.dtype == torch.bfloat16


def test_families_are_read_without_torch():
    """A command's config reads them, and a typo is answered before torch is loaded."""
    forbid = f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
    code = f"{forbid}from deradiff.models.families import FAMILIES\nassert FAMILIES"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_no_other_file_compares_with_the_name_of_a_family():
    """What differs between families is said by the family."""
    compared = []
    for folder in ELSEWHERE:
        for file in (ROOT / folder).rglob("*.py"):
            if file.parent == ROOT / "deradiff" / "models":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Compare) and names_in(node) & set(FAMILIES):
                    compared.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not compared


def names_in(node):
    """The texts that a piece of code holds."""
    constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_a_comparison_with_the_name_of_a_family_is_seen():
    for source in ('family == "sdxl"', 'family in ("sd3", "flux")'):
        assert names_in(ast.parse(source).body[0].value) & set(FAMILIES)


@every_family
def test_its_name_is_short_and_plain(name):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name)
    assert FAMILIES[name].name == name
