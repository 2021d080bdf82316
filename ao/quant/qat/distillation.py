"""Distillation: the original model is the teacher of the quantized one, on whatever text there is (arXiv:1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """How far the model is from its teacher: the mean over tokens of KL(p || q), times temperature**2, in float32.

    logits, teacher_logits: (..., V), of any floating-point dtype; p = softmax(teacher_logits / temperature), and q that of
        `logits`.

    No gradient reaches the teacher. Raises ValueError for shapes that differ, and for a temperature that is not above 0.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation_loss: logits and teacher_logits must have one shape, got {tuple(logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature must be above 0, got {temperature}")
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, -1).flatten(0, -2)  # (tokens, V)
    log_q = F.log_softmax(logits.float() / temperature, -1).flatten(0, -2)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2
