"""Cases for pipelines that diffusers' tests do not build, with tiny networks of our own.

Text encoders and autoencoders are left out where the pipeline takes embeddings and gives latents.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    DDPMPipeline,
    DDPMScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    UNet2DModel,
)
from torch import Tensor

from benchmarks.diffusers_tests.stand_ins import VisionProcessor, qwen_tokenizer

TEXT_WIDTH = 16
TOKENS = 7


class OwnCase:
    """What a case needs of a test class."""

    pipeline_class: Any

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        raise NotImplementedError

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        raise NotImplementedError


def embedding(seed: int, *shape: int) -> Tensor:
    """A random embedding, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(**arguments: Any) -> dict[str, Any]:
    """The arguments of a call of three steps, with the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    return {"num_inference_steps": 3, "generator": generator, **arguments}


def embeddings() -> dict[str, Tensor]:
    """Embeddings of a prompt and of a negative one, a row each."""
    return {
        "prompt_embeds": embedding(1, 1, TOKENS, TEXT_WIDTH),
        "negative_prompt_embeds": embedding(2, 1, TOKENS, TEXT_WIDTH),
    }


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """FLUX.2's, which several others use."""
    return AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )


class BriaFibo2(OwnCase):
    """Bria Fibo 2: the negative prompt is a second call."""

    pipeline_class = BriaFibo2Pipeline

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        transformer = BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(8, 4, 4),
            axes_lens=(64, 32, 32),
        )
        return {
            "transformer": transformer,
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": flux2_autoencoder(),
            "text_encoder": None,
            "processor": None,
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        # Of the text encoder's layers: the first one, and one more for each layer that takes it.
        layers = {name: torch.stack([rows, 2 * rows], 1) for name, rows in embeddings().items()}
        return call_of(height=32, width=32, guidance_scale=4.0, **layers)


class ErnieImage(OwnCase):
    """ERNIE-Image: embeddings are a list, with a row each."""

    pipeline_class = ErnieImagePipeline

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        transformer = ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=16,
            out_channels=16,
            text_in_dim=TEXT_WIDTH,
            rope_axes_dim=(8, 4, 4),
        )
        return {
            "transformer": transformer,
            "vae": flux2_autoencoder(),
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": FlowMatchEulerDiscreteScheduler(),
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        rows = {name: list(rows) for name, rows in embeddings().items()}
        return call_of(height=16, width=16, guidance_scale=4.0, **rows)


class Ideogram4WithoutText(Ideogram4Pipeline):
    """Ideogram 4 on a random embedding in place of its text encoder's."""

    def encode_prompt(
        self, prompt: Any, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> Any:
        """The packed conditioning of one prompt."""
        tokens = max_sequence_length + grid_h * grid_w
        features = embedding(1, 1, tokens, TEXT_WIDTH)
        features[:, max_sequence_length:] = 0
        ids = self._prepare_ids([TOKENS], grid_h, grid_w, max_sequence_length, device)
        return features, *ids


class Ideogram4(OwnCase):
    """Ideogram 4: a network of its own for the unconditional branch, and the output negated."""

    pipeline_class = Ideogram4WithoutText

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        networks = []
        for _ in range(2):
            network = Ideogram4Transformer2DModel(
                in_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                intermediate_size=32,
                adaln_dim=16,
                llm_features_dim=TEXT_WIDTH,
                mrope_section=(4, 2, 2),
            )
            networks.append(network)
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": flux2_autoencoder(),
            "text_encoder": None,
            "tokenizer": None,
            "transformer": networks[0],
            "unconditional_transformer": networks[1],
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        return call_of(
            prompt="a cat",
            height=32,
            width=32,
            guidance_scale=4.0,
            guidance_schedule=None,
            max_sequence_length=8,
        )


class LongCatImageWithoutText(LongCatImagePipeline):
    """LongCat-Image on random embeddings in place of its text encoder's."""

    def _encode_prompt(self, prompt: list[str]) -> Tensor:
        return embedding(len(prompt[0]), 1, TOKENS, TEXT_WIDTH)


class LongCatImage(OwnCase):
    """LongCat-Image: guidance rescales to the conditional branch's norm, token by token."""

    pipeline_class = LongCatImageWithoutText

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        transformer = LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=[8, 4, 4],
        )
        autoencoder = AutoencoderKL(
            block_out_channels=(4,), latent_channels=16, norm_num_groups=1, sample_size=32
        )
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": autoencoder,
            "text_encoder": None,
            "tokenizer": qwen_tokenizer(),
            "text_processor": None,
            "transformer": transformer,
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        return call_of(
            prompt="a cat", height=16, width=16, guidance_scale=4.0, enable_prompt_rewrite=False
        )


class QwenImage21(OwnCase):
    """Qwen-Image 2.1: keys and values of the text are kept from the first step on."""

    pipeline_class = QwenImage21Pipeline

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        transformer = QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 4, 4),
        )
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler(),
            "vae": None,
            "text_encoder": None,
            "processor": VisionProcessor(qwen_tokenizer()),
            "transformer": transformer,
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        masks = {
            "prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.bool),
            "negative_prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.bool),
        }
        return call_of(height=64, width=64, true_cfg_scale=4.0, **embeddings(), **masks)


class DDPM(OwnCase):
    """DDPM without a condition."""

    pipeline_class = DDPMPipeline

    def get_dummy_components(self) -> dict[str, Any]:
        """The pipeline's components."""
        unet = UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        return {"unet": unet, "scheduler": DDPMScheduler(clip_sample=False)}

    def get_dummy_inputs(self) -> dict[str, Any]:
        """The arguments of a call."""
        return call_of(output_type="np")


OWN_CASES: tuple[type[OwnCase], ...] = (
    BriaFibo2,
    DDPM,
    ErnieImage,
    Ideogram4,
    LongCatImage,
    QwenImage21,
)
