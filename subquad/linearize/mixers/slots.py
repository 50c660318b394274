"""Slots: a memory of M keys and M values that is read with a softmax (SEEDS 3.2 K11, B02, C03).

    K~_t = diag(f_t) K~_(t-1) + s_t k_t^T        V~_t likewise with v_t        o_t = V~_t^T softmax(K~_t q_t / sqrt(K))

Two passes of a gated state joined by a softmax. gated (GSA): log f = log sigmoid(W x) / 8, s = 1 - f. softmax (ABC): s_t = e^(z_t) / sum_(j<=t) e^(z_j)
with z = W x, f the ratio of the sums before and after. M slots per key/value head; gates belong to the token that is written.

slots: both passes follow the recurrence of the cell's decay and write, with a vector of M in the place of phi_k. Additive: e^z, and the slots' totals
likewise, by which keys and values are divided (ABC where nothing fades). Delta: e^z of unit length, K~_t = a (I - beta s s^T) K~_(t-1) + beta s k^T.

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, K key size, V value size, M slots, C chunk size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.additive import LOWEST, MIN_LOG_DECAY, _chunks
from subquad.kernels.ops import delta
from subquad.linearize.mixers.base import HeadShape
from subquad.linearize.mixers.gates import InputGate
from subquad.linearize.mixers.key_weights import running
from subquad.linearize.mixers.writes import complement

DAMPING = 8.0  # SEEDS 0.11
CHUNK = 32
LIMIT = 32.0  # of ABC's z, as published


def slot_gate(shape: HeadShape, slots: int, longest: float = 6.0) -> InputGate:
    """W random (equal slots would stay equal), biases from short to long memory."""
    gate = InputGate(shape.hidden, (shape.kv_heads, slots), 0.0)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape) / shape.hidden**0.5)
        gate.bias.copy_(torch.linspace(0.0, longest, slots).repeat(shape.kv_heads))
    return gate


def gated_slots(logit_BTGM: Tensor, on_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(log f, s) of GSA; rows without a token leave the slots alone."""
    on = on_BT[..., None, None].float()
    log_f = F.logsigmoid(logit_BTGM.float()) / DAMPING * on
    log_f = log_f.clamp_min(MIN_LOG_DECAY)
    return log_f, complement(log_f)


def softmax_slots(logit_BTGM: Tensor, on_BT: Tensor, total_BGM: Tensor) -> tuple[Tensor, Tensor]:
    """(e^z, its running sum [B, T, G, M]) of ABC. z lies within 32 of 0, so that both stay inside fp32 without a decay."""
    write = slot_writes(logit_BTGM, on_BT)
    return write, running(write, total_BGM)


def slot_writes(logit_BTGM: Tensor, on_BT: Tensor) -> Tensor:
    """e^z, 0 in rows without a token."""
    return logit_BTGM.float().clamp(-LIMIT, LIMIT).exp() * on_BT[..., None, None]


def unit_writes(logit_BTGM: Tensor, on_BT: Tensor) -> Tensor:
    """e^z / |e^z|, 0 in rows without a token."""
    return F.normalize(logit_BTGM.float().softmax(-1), dim=-1) * on_BT[..., None, None]


def slot_totals(write_BTGM: Tensor, log_f_BTGM: Tensor | None, total_BGM: Tensor) -> tuple[Tensor, Tensor]:
    """(what has been written to each slot and not faded [B, T, G, M], the same after the last token): keys and queries of one 1."""
    ones = torch.ones_like(write_BTGM[..., :1])
    total, last = slot_logits(ones.unsqueeze(3), ones, write_BTGM, log_f_BTGM, total_BGM.unsqueeze(-1))
    return total.squeeze(3), last.squeeze(-1)


def corrected(k_BTGK: Tensor, s_BTGM: Tensor, beta_BTG: Tensor, log_BTG: Tensor | None, state_BGMK: Tensor) -> Tensor:
    """beta_t (k_t - a_t K~_(t-1)^T s_t) [B, T, G, K]: with these in the place of k the delta rule is an additive write. Each token asks for the next."""
    said = torch.einsum("bgm,bgmk->bgk", s_BTGM[:, 0], state_BGMK).unsqueeze(1)
    if s_BTGM.shape[1] > 1:
        k, s, beta = (x[:, :-1] for x in (k_BTGK, s_BTGM, beta_BTG))
        log = None if log_BTG is None else log_BTG[:, :-1]
        said = torch.cat([said, delta(s_BTGM[:, 1:], s, k, beta, log, initial_state=state_BGMK.contiguous())[0]], 1)
    said = said if log_BTG is None else said * log_BTG.unsqueeze(-1).exp()
    return beta_BTG.unsqueeze(-1) * (k_BTGK - said)


def slot_logits(
    q_BTGRK: Tensor, k_BTGK: Tensor, write_BTGM: Tensor, log_f_BTGM: Tensor | None, state_BGMK: Tensor
) -> tuple[Tensor, Tensor]:
    """(K~_t q_t [B, T, G, R, M], the slots' keys after the last token). Chunkwise; decays stand on the side that is read out, M."""
    T = q_BTGRK.shape[1]
    C = min(CHUNK, T)
    strong = log_f_BTGM is not None and q_BTGRK.device.type != "mps" and bool((log_f_BTGM < MIN_LOG_DECAY).any())
    low, dtype = (LOWEST, torch.float64) if strong else (MIN_LOG_DECAY, torch.float32)  # as in additive.py
    q = _chunks(q_BTGRK.to(dtype), C).transpose(3, 4)  # [B, G, N, R, C, K]
    k, s, state_BGMK = _chunks(k_BTGK.to(dtype), C), _chunks(write_BTGM.to(dtype), C), state_BGMK.to(dtype)  # [B, G, N, C, K | M]
    log = torch.zeros_like(s) if log_f_BTGM is None else _chunks(log_f_BTGM.to(dtype).clamp_min(low), C)
    c = log.cumsum(3)
    last, middle = c[:, :, :, -1:], c[:, :, :, C // 2 : C // 2 + 1]
    mask = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2).unsqueeze(3)).masked_fill(~mask, 0.0)  # [B, G, N, R, C, C]
    inside = (scores @ (s * (middle - c).exp()).unsqueeze(3)) * (c - middle).exp().unsqueeze(3)
    sums, fade = (s * (last - c).exp()).transpose(-1, -2) @ k, last.exp().transpose(-1, -2)  # [B, G, N, M, K], [B, G, N, M, 1]
    before = []
    for n in range(sums.shape[2]):
        before.append(state_BGMK)
        state_BGMK = state_BGMK * fade[:, :, n] + sums[:, :, n]
    out = inside + (q @ torch.stack(before, 2).transpose(-1, -2).unsqueeze(3)) * c.exp().unsqueeze(3)
    return out.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, :T].float(), state_BGMK.float()


def softmax_parts(logits_BTGRM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, their sum, log scale) of a softmax, un-normalised so that the window's logits can join."""
    top = logits_BTGRM.amax(-1, keepdim=True).detach()
    weights = (logits_BTGRM - top).exp()
    return weights, weights.sum(-1), top.squeeze(-1)
