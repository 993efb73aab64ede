"""The dial in models of diffusers that only modular pipelines sample: FLUX.3 and Anima.

Their denoising blocks run without text encoder and autoencoder, on embeddings.
"""

import pytest
import torch
from diffusers import (
    AnimaAutoBlocks,
    AnimaTextConditioner,
    AutoencoderKLFlux2,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux3AutoBlocks,
    Flux3Transformer2DModel,
)
from peft import LoraConfig

from deradiff.realignment.context import realign
from tests.support.modular_pipelines import ByHand
from tests.support.tiny_pipelines import perturbed_denoiser

LAM = 0.4
AROUND_DENOISING = ("prompt_upsampler", "text_encoder", "vae_encoder", "decode")


def flux3():
    """The blocks, components and embeddings of a tiny FLUX.3."""
    network = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    embeddings = {
        "prompt_embeds": torch.randn(1, 7, 32),
        "negative_prompt_embeds": torch.randn(1, 7, 32),
    }
    return Flux3AutoBlocks(), {"transformer": network, "vae": vae}, embeddings


def anima():
    """The blocks, components and embeddings of a tiny Anima."""
    network = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=8,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    conditioner = AnimaTextConditioner(
        source_dim=16,
        target_dim=16,
        model_dim=16,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=64,
        min_sequence_length=8,
    )
    embeddings = {}
    for sign in ("", "negative_"):
        embeddings[f"{sign}qwen_prompt_embeds"] = torch.randn(1, 6, 16)
        embeddings[f"{sign}qwen_attention_mask"] = torch.ones(1, 6)
        embeddings[f"{sign}t5_input_ids"] = torch.randint(0, 64, (1, 5))
        embeddings[f"{sign}t5_attention_mask"] = torch.ones(1, 5)
    return AnimaAutoBlocks(), {"transformer": network, "text_conditioner": conditioner}, embeddings


@pytest.fixture(params=[flux3, anima])
def pipe_and_embeddings(request):
    """A modular pipeline of denoising alone, and what it is called with."""
    torch.manual_seed(0)
    blocks, components, embeddings = request.param()
    for name in AROUND_DENOISING:
        blocks.sub_blocks.pop(name, None)
    pipe = blocks.init_pipeline()
    known = {name: part for name, part in components.items() if name in pipe._component_specs}
    pipe.update_components(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **known)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, embeddings


def sample(pipe, embeddings):
    """Latents of three steps."""
    return pipe(
        **{name: tensor.clone() for name, tensor in embeddings.items()},
        num_inference_steps=3,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
        output="latents",
    )


def test_a_full_anchor_is_mixed_as_by_hand(pipe_and_embeddings, tmp_path):
    pipe, embeddings = pipe_and_embeddings
    reference = sample(pipe, embeddings)
    anchor = perturbed_denoiser(pipe.transformer)
    anchor.save_pretrained(tmp_path / "transformer")

    with realign(pipe, tmp_path, 0) as dial:
        assert torch.equal(sample(pipe, embeddings), reference)
        dial.lam = 1
        anchored = sample(pipe, embeddings)
        dial.lam = LAM
        middle = sample(pipe, embeddings)
        assert dial.evaluations == 2
        assert dial.path_kl > 0
    with ByHand(pipe, anchor.state_dict(), (1.0, 1.0)).installed():
        torch.testing.assert_close(anchored, sample(pipe, embeddings), rtol=0, atol=1e-5)
    with ByHand(pipe, anchor.state_dict(), (LAM, LAM)).installed():
        torch.testing.assert_close(middle, sample(pipe, embeddings), rtol=0, atol=1e-5)
    assert (middle - reference).abs().max() > 1e-3


def test_a_lora_is_the_stock_pipelines_at_one(pipe_and_embeddings, tmp_path):
    pipe, embeddings = pipe_and_embeddings
    reference = sample(pipe, embeddings)
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    pipe.transformer.save_lora_adapter(tmp_path)
    stock = sample(pipe, embeddings)
    pipe.transformer.delete_adapters("default")

    with realign(pipe, tmp_path, 1) as dial:
        assert torch.equal(sample(pipe, embeddings), stock)
        dial.lam = 0
        assert torch.equal(sample(pipe, embeddings), reference)
    assert not torch.equal(stock, reference)
