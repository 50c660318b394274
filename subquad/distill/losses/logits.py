"""Losses on logits, one number per position, fp32 whatever the logits' dtype.

Key: N positions (batch and tokens flattened, or a chunk of them), V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.distill.losses import IGNORE


def kl(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) in nats, times temperature^2, which keeps the gradients' size (Hinton et al. 2015, 2). [N]."""
    return _KL.apply(student_NV, teacher_NV, temperature)


def cross_entropy(student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor, temperature: float = 1.0) -> Tensor:
    """Next-token cross entropy in nats; 0 where the label is IGNORE. `teacher_NV` and `temperature` do not enter. [N]."""
    return F.cross_entropy(student_NV.float(), labels_N, ignore_index=IGNORE, reduction="none")


class _KL(torch.autograd.Function):
    """The gradient, softmax(student) - softmax(teacher), is made during the forward pass out of buffers the loss needs anyway:
    autograd over two log_softmax would keep two more [N, V] tensors and read them again."""

    @staticmethod
    def forward(ctx, student_NV, teacher_NV, temperature):
        teacher = F.log_softmax(_scaled(teacher_NV, temperature), dim=-1)
        student = F.log_softmax(_scaled(student_NV, temperature), dim=-1)
        share = teacher.exp()
        loss = torch.linalg.vecdot(share, teacher.sub_(student)) * temperature**2
        if ctx.needs_input_grad[0]:
            ctx.gradient, ctx.dtype = student.exp_().sub_(share), student_NV.dtype
            if temperature != 1.0:
                ctx.gradient.mul_(temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, hence usable once
        assert gradient is not None, "kl can be differentiated once per forward pass"
        return gradient.mul_(grad_N.unsqueeze(-1)).to(ctx.dtype), None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature
