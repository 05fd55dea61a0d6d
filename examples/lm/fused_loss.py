"""Output layer and cross entropy in one, by liger-kernel: the logits are never in memory whole."""

from __future__ import annotations

import torch
from torch import Tensor

from lm.failures import UsageError


def require_liger() -> None:
    """Raises UsageError where --liger can not work, before anything else has happened."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the package liger-kernel for --liger",
            str(error),
            "pip install liger-kernel, or leave out --liger",
        ) from error


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Mean cross entropy of hidden @ weight.T + bias, fp32 scalar; labels of -100 do not count.

    hidden: (N, H); weight: (V, H); labels: int64 (N,); bias: (V,). Products in autocast's dtype, as
    Linear would have them; the weight's gradient is summed in fp32 over the chunks.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)  # what Liger writes in place bypasses autocast
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return loss(weight, hidden, labels, bias)
