"""Keeping the winner: terms beside the loss of Diffusion-DPO against its collapse.

DPO lowers its loss as well by raising the loser's error as by lowering the winner's, and through
shared weights the first can raise the winner's error, too.

Shapes: B pairs; the first axis, of 2, is the winner and the loser, in this order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loser_scale(output: Tensor, target: Tensor) -> Tensor:
    """How much of the loser's gradient leaves the winner's error as it is, to first order.

    Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317). With the gradients g_w and g_l of both errors
    by the network's outputs, a step along -(g_w - s g_l) changes the winner's error by about
    -<g_w, g_w - s g_l>, which is at most 0 for s <= |g_w|^2 / <g_w, g_l>. It takes the Jacobians of
    both outputs for one and the same.

    Args:
        output: of the trained network, (2, B, C, H, W).
        target: what it should be, (2, B, C, H, W).

    Returns:
        s (B,), in [0, 1]: 1 where the loser's gradient does the winner no harm.
    """
    # Both gradients, but for a factor that they share
    winner, loser = (output.detach().float() - target.float()).flatten(start_dim=2)
    squared_norm = (winner * winner).sum(-1)
    alignment = (winner * loser).sum(-1)
    scale = squared_norm / alignment.clamp(min=torch.finfo(alignment.dtype).tiny)
    return torch.where(alignment > squared_norm, scale, torch.ones_like(scale))


def with_scaled_loser(error: Tensor, scale: Tensor) -> Tensor:
    """The same errors, of which the loser's passes on a part of its gradient.

    Args:
        error: (2, B).
        scale: that part, (B,).
    """
    winner, loser = error
    return torch.stack([winner, loser.detach() + scale * (loser - loser.detach())])
