"""Which pipelines belong to which family, what each one's denoiser is told, and what is refused before a weight is read."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import diffusers
import pytest
import torch
from huggingface_hub import constants

from deradiff import hub
from deradiff.models.base_model import BaseModel, check_autoencoder
from deradiff.models.families import FAMILIES, family_of
from tests.support.tiny_pipelines import (
    KINDS,
    SIDE,
    save_tiny,
    tiny_denoiser,
    tiny_pipeline,
    tiny_variant,
)


@pytest.fixture(scope="module")
def pipes():
    return {family: tiny_pipeline(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_of_any_kind_is_of_its_family(pipes, family):
    for kind in KINDS:
        if (family, kind) != ("sd3", "controlnet_img2img"):  # diffusers has none
            assert family_of(tiny_variant(pipes[family], kind)).name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_denoiser_and_a_subclass_of_a_pipeline_are_seen_through(family):
    pipe = tiny_pipeline(family)
    name = FAMILIES[family].denoiser
    setattr(pipe, name, torch.compile(getattr(pipe, name)))
    assert family_of(pipe).name == family
    pipe.__class__ = type("Ours", (type(pipe),), {})
    assert family_of(pipe).name == family


FOREIGN = [  # each begins as a family's name does, or has a family's denoiser
    "StableDiffusionUpscalePipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionLatentUpscalePipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "Flux2Pipeline",
    "FluxKontextPipeline",
    "FluxFillPipeline",
    "FluxControlPipeline",
    "FluxControlInpaintPipeline",
    "KolorsPipeline",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_what_is_of_no_family_is_refused(family, name):
    assert hasattr(diffusers, name), "diffusers still has it"
    pipe = type(name, (), {FAMILIES[family].denoiser: tiny_denoiser(family)})()
    with pytest.raises(
        ValueError,
        match=rf"the pipeline is a {name} with a .*belongs to no family .*sd15, sdxl, sd3, flux",
    ):
        family_of(pipe)


@pytest.mark.parametrize(("family", "other"), [("sd3", "flux"), ("flux", "sd3"), ("sd15", "flux")])
def test_the_denoiser_decides_too(family, other):
    pipe = type(FAMILIES[family].pipeline, (), {FAMILIES[other].denoiser: tiny_denoiser(other)})()
    with pytest.raises(
        ValueError, match=f"a {FAMILIES[family].pipeline} with a {FAMILIES[other].denoiser_class}"
    ):
        family_of(pipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_is_under_a_megabyte_and_loads(saved, family, pipes):
    folder = saved[family]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 1_000_000
    assert BaseModel(str(folder)).family.name == family
    pipe, name = BaseModel(str(folder)).load_pipeline(torch.bfloat16), FAMILIES[family].denoiser
    assert family_of(pipe).name == family and getattr(pipe, name).dtype == torch.bfloat16
    ours, theirs = getattr(pipes[family], name).state_dict(), getattr(pipe, name).state_dict()
    assert all(torch.equal(ours[key].bfloat16(), theirs[key]) for key in ours)


def test_a_checkpoint_saved_as_another_kind_loads_as_text_to_image(saved, tmp_path):
    index = json.loads((saved["sd15"] / "model_index.json").read_text())
    for name, family in [
        ("StableDiffusionInpaintPipeline", "sd15"),
        ("StableDiffusionXLImg2ImgPipeline", "sdxl"),
    ]:
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        assert BaseModel(str(tmp_path)).family.name == family
    for changed in (
        {"_class_name": "StableDiffusionUpscalePipeline"},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"unet": None},
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changed))
        with pytest.raises(ValueError, match="belongs to no family"):
            BaseModel(str(tmp_path)).family


@pytest.mark.parametrize("family", FAMILIES)
def test_training_asks_the_denoiser_what_its_pipeline_asks_it(pipes, family):
    """One step of the stock pipeline without guidance, overheard, against `encode_prompts` and `denoise` on the same latents."""
    pipe, heard = pipes[family], []
    denoiser = getattr(pipe, FAMILIES[family].denoiser)
    listen = denoiser.register_forward_hook(
        lambda _, args, kwargs, output: heard.append((args, kwargs, output[0])), with_kwargs=True
    )
    x = torch.randn(
        2, *FAMILIES[family].latent_shape(pipe, 64), generator=torch.Generator().manual_seed(0)
    )
    flux = {"guidance_scale": 3.5} if family == "flux" else {"guidance_scale": 1.0}
    latents = type(pipe)._pack_latents(x, *x.shape) if family == "flux" else x
    pipe(
        ["a cat", "two dogs"],
        height=64,
        width=64,
        num_inference_steps=1,
        latents=latents,
        output_type="latent",
        **flux,
    )
    listen.remove()
    (_, _, output), time_ = heard[0], pipe.scheduler.timesteps[0].expand(2)
    with torch.no_grad():
        conditioning = FAMILIES[family].encode_prompts(pipe, ["a cat", "two dogs"])
        ours = FAMILIES[family].denoise(denoiser, x, time_, conditioning, 64)
    theirs = type(pipe)._unpack_latents(output, 64, 64, 8) if family == "flux" else output
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "channels"), [("sd15", 4), ("sdxl", 4), ("sd3", 16), ("flux", 16)]
)
def test_latents_have_the_familys_shape(pipes, family, channels):
    assert FAMILIES[family].latent_shape(pipes[family], 64) == (channels, SIDE, SIDE)
    with pytest.raises(
        ValueError, match=f"multiples of {FAMILIES[family].multiple} pixels, and 63 is not one"
    ):
        FAMILIES[family].latent_shape(pipes[family], 63)


def test_oblong_latents_keep_their_rows_and_columns(pipes):
    """FLUX tells a patch from its place; a transposed picture is another question."""
    pipe, x = pipes["flux"], torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    flux = FAMILIES["flux"]
    texts = flux.encode_prompts(pipe, ["x"])
    with torch.no_grad():
        wide = flux.denoise(pipe.transformer, x, torch.tensor([500.0]), texts, 64)
        high = flux.denoise(
            pipe.transformer, x.transpose(2, 3).contiguous(), torch.tensor([500.0]), texts, 64
        )
    assert wide.shape == x.shape and not torch.allclose(wide, high.transpose(2, 3), atol=1e-3)


class TestHub:
    """By stand-ins for the hub's client: the suite has no network."""

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        repo = tmp_path / "models--org--base"
        save_tiny("sd15", repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
        return repo

    def test_the_cached_copy_serves_where_nobody_answers(self, cache):
        assert BaseModel("org/base").family.name == "sd15"
        commit = hub.commit_of(BaseModel("org/base").index_file)
        assert commit == "0123456789abcdef0123456789abcdef01234567"
        repo, names = hub.listing("org/base")
        assert repo.endswith("4567") and "unet/config.json" in names

    def test_nothing_is_waited_for(self, cache, monkeypatch):
        calls = []
        monkeypatch.setattr(
            "deradiff.hub.get_hf_file_metadata",
            lambda url, timeout: calls.append((url, timeout)) or _unreachable(),
        )
        monkeypatch.setattr(
            "deradiff.hub.hf_hub_download", lambda *_, **__: pytest.fail("this one retries")
        )
        start = time.monotonic()
        for missing in (
            lambda: BaseModel("org/none").family,
            lambda: check_autoencoder("org/none"),
        ):
            with pytest.raises(
                ValueError,
                match=r"org/none is no local folder and could not be read from the hub \(ConnectTimeout\)",
            ):
                missing()
        assert BaseModel("org/base").family.name == "sd15" and len(calls) == 3
        assert time.monotonic() - start < 2 and all(timeout <= 10 for _, timeout in calls)

    def test_an_answering_hub_is_asked_for_the_file(self, cache, monkeypatch):
        file = cache / "snapshots" / "0123456789abcdef0123456789abcdef01234567" / "model_index.json"
        monkeypatch.setattr(
            "deradiff.hub.get_hf_file_metadata",
            lambda url, timeout: SimpleNamespace(commit_hash="new"),
        )
        monkeypatch.setattr("deradiff.hub.hf_hub_download", lambda repo, name, **_: str(file))
        assert BaseModel("org/other", "v2").family.name == "sd15"


def _unreachable():
    from httpx import ConnectTimeout

    raise ConnectTimeout("no network")


@pytest.mark.parametrize("base", ["./none", "runs/train/none", "none", "a/b/c"])
def test_a_base_that_is_no_folder_and_no_id_is_told_at_once(base):
    with pytest.raises(ValueError, match="there is no pipeline folder"):
        BaseModel(base).family
