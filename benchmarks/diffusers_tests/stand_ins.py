"""What diffusers' tests load from the hub, made on the spot: tokenizers, and tiny text encoders.

The tests build their denoisers themselves, but read tokenizers and some encoders from the hub. Here
each `from_pretrained` of a hub id answers with a random model of that kind and width, and with a
tokenizer of single bytes. So the cases run without a network, and on the same networks everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from diffusers import UNet2DModel
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_base import ImageProcessingMixin

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
FIRST_BYTE = 10
"""The id of the first byte, behind the special tokens of most."""

QWEN_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
"""The ids that Qwen's text encoders look for."""

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template of Qwen's kind, for text and images."""

PATCH = 14
MERGE = 2
"""Side of a patch of an image, and of a square of patches that becomes one token."""


# Tokenizers.


class SparseTokenizer(transformers.PreTrainedTokenizerFast):
    """A tokenizer whose ids have gaps: its size is that of the embedding that holds them all."""

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self.get_vocab().values()) + 1

    @property
    def vocab_size(self) -> int:
        """The same."""
        return len(self)


def byte_tokenizer(
    specials: Mapping[str, int], template: str = "$A", length: int = 512, **names: str
) -> Any:
    """A tokenizer of single bytes.

    Args:
        specials: its special tokens, and their ids.
        template: where these stand around a text `$A`.
        length: the most tokens.
        names: which of the special tokens is which, such as `pad_token`.
    """
    vocabulary = {byte: FIRST_BYTE + number for number, byte in enumerate(BYTES)}
    vocabulary |= specials
    unknown = names.get("unk_token", names["pad_token"])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    used = [(token, number) for token, number in specials.items() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    others = [token for token in specials if token not in names.values()]
    made = SparseTokenizer(
        tokenizer_object=tokenizer,
        model_max_length=length,
        additional_special_tokens=others,
        **names,
    )
    made.chat_template = CHAT
    return made


def clip_tokenizer() -> Any:
    """CLIP's, with ids below 1000."""
    symbols = ["<|startoftext|>", "!", "<|endoftext|>"]
    symbols += [byte for byte in BYTES if byte != "!"]
    symbols += [f"{byte}</w>" for byte in BYTES]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's."""
    specials = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return byte_tokenizer(specials, "$A </s>", **names)


def llama_tokenizer() -> Any:
    """Llama's, and that of others of its kind."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    made = byte_tokenizer(
        specials,
        "<s> $A",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.chat_template = CHAT.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    return made


def bert_tokenizer() -> Any:
    """BERT's."""
    specials = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    names = {
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
    }
    return byte_tokenizer(specials, "[CLS] $A [SEP]", length=77, **names)


def qwen_tokenizer() -> Any:
    """Qwen's, whose special tokens lie behind 150 000 others."""
    names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return byte_tokenizer(QWEN_TOKENS, length=4096, **names)


def gemma3_tokenizer() -> Any:
    """Gemma 3's."""
    specials = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return byte_tokenizer(specials, "<bos> $A", length=1024, **names)


def gemma_tokenizer() -> Any:
    """Of eight ids, as the tests' tiny Gemma 2 has."""
    letters = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 4, "e": 5, "o": 6, "t": 7}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, unk_token="<unk>", **names
    )
    made.chat_template = CHAT
    return made


class PositionedTokenizer:
    """ChatGLM's, which counts the positions of the tokens, too."""

    def __init__(self) -> None:
        self.tokenizer = llama_tokenizer()
        self.tokenizer.padding_side = "left"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens of texts, with `position_ids`."""
        tokens = self.tokenizer(*args, **kwargs)
        tokens["position_ids"] = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return tokens


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "mclip": llama_tokenizer,
    "clip": clip_tokenizer,
    "t5": t5_tokenizer,
    "bert": bert_tokenizer,
    "qwen": qwen_tokenizer,
    "cosmos3": qwen_tokenizer,
    "gemma3": gemma3_tokenizer,
    "gemma": gemma_tokenizer,
}
"""By a part of the hub id, the first one that is in it; Llama's for any other."""


def tokenizer_for(hub_id: str) -> Any:
    """The tokenizer in place of one on the hub."""
    for part, make in TOKENIZERS.items():
        if part in hub_id.lower():
            return make()
    return llama_tokenizer()


class VisionProcessor:
    """What a processor of texts with images does: patches, and a token for each of them.

    Args:
        tokenizer: of the texts.
    """

    image_token = "<|image_pad|>"
    image_token_id = QWEN_TOKENS["<|image_pad|>"]
    merge_size = MERGE
    patch_size = PATCH

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = self

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, images: Any = None, padding: Any = True, **options: Any) -> Any:
        """The tokens of texts, and the patches of images.

        Each image is four tokens, whatever its size.
        """
        texts = [text] if isinstance(text, str) else list(text)
        found: dict[str, Any] = {}
        if images is not None:
            count = len(_flattened(images))
            side = 2 * MERGE
            found["image_grid_thw"] = torch.tensor([[1, side, side]] * count)
            width = 3 * 2 * PATCH**2
            patches = torch.linspace(-1, 1, side**2 * width).view(side**2, width)
            found["pixel_values"] = patches.repeat(count, 1)
            repeated = self.image_token * (side // MERGE) ** 2
            texts = [text.replace(self.image_token, repeated) for text in texts]
        taken = {}
        for name in ("max_length", "truncation", "padding_side", "add_special_tokens"):
            if name in options:
                taken[name] = options[name]
        tokens = self.tokenizer(texts, padding=padding, return_tensors="pt", **taken)
        if images is not None:
            found["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).long()
        return BatchFeature(found | tokens)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """A chat as text or tokens; tokens come as a batch."""
        found = self.tokenizer.apply_chat_template(messages, **options)
        is_one_chat = isinstance(found, list) and found and isinstance(found[0], int)
        return [found] if is_one_chat else found

    def to_dict(self) -> dict[str, Any]:
        """What is printed of it."""
        return {}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved."""


def _flattened(images: Any) -> list[Any]:
    """Images of however many lists in one list."""
    if not isinstance(images, list | tuple):
        return [images]
    found = []
    for part in images:
        found += _flattened(part)
    return found


SMALL_AREA = 64 * 64
"""Pixels of an image to edit."""


# Text encoders, of the widths that the tests' denoisers expect.


def t5_config() -> Any:
    """T5's."""
    return transformers.T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0
    )


def umt5_config() -> Any:
    """UMT5's."""
    return transformers.UMT5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0
    )


def bert_config() -> Any:
    """BERT's."""
    return transformers.BertConfig(
        vocab_size=1124,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
    )


def llama_config() -> Any:
    """Llama's."""
    return transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        pad_token_id=3,
    )


def siglip_config() -> Any:
    """Siglip's, of images."""
    return transformers.SiglipVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=30,
        patch_size=2,
    )


def chatglm_config() -> Any:
    """ChatGLM's."""
    return ChatGLMConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        kv_channels=4,
        num_attention_heads=2,
        padded_vocab_size=1000,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        rmsnorm=True,
        original_rope=True,
        add_bias_linear=False,
        add_qkv_bias=True,
    )


def gemma3_config() -> Any:
    """Gemma 3's, with its part for images."""
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": PATCH,
    }
    return transformers.Gemma3Config(text_config=text, vision_config=vision)


def qwen_text(width: int) -> dict[str, Any]:
    """The part for texts of Qwen's vision models.

    Args:
        width: of its hidden states.
    """
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return {
        "vocab_size": 152064,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": width // 8,
        "head_dim": 8,
        "rope_parameters": rope,
    }


def qwen2_config() -> Any:
    """Qwen 2 VL's."""
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "patch_size": PATCH,
    }
    return transformers.Qwen2VLConfig(text_config=qwen_text(16), vision_config=vision)


def qwen3_config(width: int = 32) -> Any:
    """Qwen 3 VL's.

    Args:
        width: of its hidden states.
    """
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLConfig(text_config=qwen_text(width), vision_config=vision)


CONFIGS: dict[str, Callable[[], Any]] = {
    "UMT5": umt5_config,
    "T5": t5_config,
    "Bert": bert_config,
    "Llama": llama_config,
    "Siglip": siglip_config,
    "ChatGLM": chatglm_config,
    "Gemma3": gemma3_config,
    "Qwen2VL": qwen2_config,
    "Qwen3VL": qwen3_config,
}
"""By the beginning of the class's name, the first one that it has."""


CONFIGS_OF: dict[str, Callable[[], Any]] = {
    "huangfeice/tiny-random-Qwen3VLForConditionalGeneration": partial(qwen3_config, 16),
}
"""By the hub id, where a class has several widths."""


def model_of(model_class: Any, hub_id: str) -> Any:
    """A random model in place of one on the hub. Raises OSError for one that is not known."""
    for beginning, make in CONFIGS.items():
        if model_class.__name__.startswith(beginning):
            torch.manual_seed(0)
            model = model_class(CONFIGS_OF.get(hub_id, make)()).eval()
            # ChatGLM leaves its memory as it finds it.
            for parameter in model.parameters():
                if beginning == "ChatGLM":
                    torch.nn.init.normal_(parameter, std=0.1)
            return model
    raise OSError(f"there is no stand-in for {model_class.__name__}")


IMAGE_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Siglip": ("SiglipImageProcessorPil", {"size": {"height": 30, "width": 30}}),
    "DPT": ("DPTImageProcessorPil", {"size": {"height": 32, "width": 32}}),
}
"""transformers' class and its options, by the beginning of the name of the class asked for."""


def image_processor_of(processor_class: Any) -> Any:
    """An image processor in place of one on the hub. Raises OSError for one that is not known."""
    for beginning, (name, options) in IMAGE_PROCESSORS.items():
        if processor_class.__name__.startswith(beginning):
            return getattr(transformers, name)(**options)
    raise OSError(f"there is no stand-in for {processor_class.__name__}")


def consistency_unet(**kwargs: Any) -> UNet2DModel:
    """The network of diffusers' tests of consistency models.

    Args:
        kwargs: of `from_pretrained`; its `subfolder` says whether the network is told a class.
    """
    torch.manual_seed(0)
    is_conditional = kwargs["subfolder"].endswith("class_cond")
    return UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=10 if is_conditional else None,
    )


# In place of `from_pretrained`.


def _tokenizer(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return tokenizer_for(hub_id)


def _config(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    if "t5" not in hub_id.lower():
        raise OSError(f"there is no stand-in for the config of {hub_id}")
    return t5_config()


def _processor(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return VisionProcessor(tokenizer_for(hub_id))


def _image_processor(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return image_processor_of(owner)


def _model(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return model_of(owner, hub_id)


def _unet(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return consistency_unet(**kwargs)


def _glm_tokenizer(owner: Any, hub_id: str, **kwargs: Any) -> Any:
    return PositionedTokenizer()


STAND_INS: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (transformers.PreTrainedTokenizerBase, _tokenizer),
    (transformers.AutoTokenizer, _tokenizer),
    (transformers.AutoConfig, _config),
    (transformers.AutoProcessor, _processor),
    (transformers.ProcessorMixin, _processor),
    (ImageProcessingMixin, _image_processor),
    (transformers.PreTrainedModel, _model),
    (ChatGLMTokenizer, _glm_tokenizer),
    (UNet2DModel, _unet),
)
"""Whose `from_pretrained` answers what."""


def install() -> None:
    """Have every `from_pretrained` of a hub id answer with a stand-in, until the process ends."""
    for owner, stand_in in STAND_INS:
        owner.from_pretrained = classmethod(_local_or(owner.from_pretrained.__func__, stand_in))
    # Those that edit an image bring it to a million pixels, whatever its size: 30 s a call.
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        module.calculate_dimensions = partial(_small_sides, module.calculate_dimensions)
    # torchvision, which does not install beside a torch for the CPU, resizes a mask for Cosmos.
    for module in (transformer_cosmos, controlnet_cosmos):
        if not hasattr(module, "transforms"):
            module.transforms = SimpleNamespace(
                functional=SimpleNamespace(resize=_resized),
                InterpolationMode=SimpleNamespace(NEAREST="nearest"),
            )


def _small_sides(sides: Callable[..., Any], area: float, ratio: float) -> Any:
    """The sides of a small image. The function `sides` has those of one of a given area."""
    return sides(min(area, SMALL_AREA), ratio)


def _resized(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
    return torch.nn.functional.interpolate(mask, size, mode=interpolation)


def _local_or(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    """A `from_pretrained` that reads folders, and has a stand-in for hub ids."""

    def from_pretrained(owner: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(source):
            return original(owner, source, *args, **kwargs)
        return stand_in(owner, str(source), **kwargs)

    return from_pretrained
