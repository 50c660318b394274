"""Table of losses. A recipe names them with weights: `losses: {kl: 1.0, cross_entropy: 0.1}`.

Two kinds, because they compare different signals:
  ATTENTION_LOSSES  loss(mixed_BTHV, exact_BTHV, padding_BT | None) -> scalar; one layer's attention output against the teacher's
  LOGIT_LOSSES      loss(student_NV, teacher_NV | None, labels_N, temperature) -> loss_N; per position, fp32. Masking and the token mean
                    are done once, by the caller (`losses/head.py`), so a new loss is one plain differentiable function and one row.
"""

ATTENTION_LOSSES = {
    "attention_output": "subquad.distill.losses.attention:attention_output",
}
LOGIT_LOSSES = {
    "kl": "subquad.distill.losses.logits:kl",
    "cross_entropy": "subquad.distill.losses.logits:cross_entropy",
}
LOSSES = ATTENTION_LOSSES | LOGIT_LOSSES

NEEDS_TEACHER = frozenset({"attention_output", "kl"})  # cross_entropy alone runs without a teacher forward

IGNORE = -100  # label of a position that counts in no loss (the value transformers uses)
