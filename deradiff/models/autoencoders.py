"""Autoencoders that overflow in float16, and the precision that they encode in.

The original one of SDXL makes numbers above 65504, the largest of float16: its latents are NaN and
its images black. Its config says so, `force_upcast: true`. It is computed in float32 instead, as
diffusers' SDXL pipelines do when they decode. bfloat16 has the range of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def overflows(vae: Any) -> bool:
    """Whether an autoencoder is in float16, and its config says that it overflows there.

    diffusers fills in `force_upcast: true` where a config says nothing, as SD1.5's does: that does
    not count.

    Args:
        vae: an autoencoder of diffusers.
    """
    defaults = vae.config.get("_use_default_values") or ()
    is_named = bool(vae.config.get("force_upcast")) and "force_upcast" not in defaults
    return vae.dtype == torch.float16 and is_named


@contextmanager
def encoding_precision(vae: Any) -> Iterator[None]:
    """Within the block an autoencoder that overflows is in float32, and afterwards as it was.

    Nothing is lost on the way: each number of float16 is one of float32. Autocast is off for it.

    Args:
        vae: an autoencoder of diffusers.
    """
    if not overflows(vae):
        yield
        return
    # `to` of diffusers' own would warn each time
    nn.Module.to(vae, torch.float32)
    try:
        with torch.autocast(vae.device.type, enabled=False):
            yield
    finally:
        nn.Module.to(vae, torch.float16)
