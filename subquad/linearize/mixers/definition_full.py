"""What the mixers that keep every key compute, one query at a time: the oracle of the tests (SEEDS D, E, C04, C08, J01).

z are the scores of the keys a query sees, n their number, p the number learned for the query's head. Key: as in base.py.
"""

import math

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.full import Full
from subquad.linearize.mixers.sparse import DeltaCorrection, NativeSparse


def full_definition(mixer: Mixer, call: AttentionCall) -> Tensor:
    """o [B, T, G, R, V]; O(T^2) and slow."""
    s = torch.einsum("btgrk,bjgk->bgrtj", call.q_BTGRK, call.k_BTGK) * call.scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    T = s.shape[-1]
    apart = torch.arange(T)[:, None] - torch.arange(T)[None]
    rule = {Full: _full, NativeSparse: _native, DeltaCorrection: _delta}[type(mixer)]
    return rule(mixer, call, s, apart)


def _read(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bgrtj,bjgv->btgrv", weights, v)


def _softmax(s: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    """e^s / (what a learned sink takes + sum e^s) over the mask; rows without a key are 0."""
    top = s.detach().masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
    top = torch.where(top == float("-inf"), 0.0, top)
    lifted = (s - top).masked_fill(~mask, float("-inf")).exp()
    extra = 0.0 if call.sink_logit_GR is None else (call.sink_logit_GR[None, :, :, None, None] - top).exp()
    return lifted / (lifted.sum(-1, keepdim=True) + extra).clamp_min(1e-30)


def _full(mixer: Full, call: AttentionCall, s: Tensor, apart: Tensor) -> Tensor:
    _G, _R, T = s.shape[1], s.shape[2], s.shape[-1]
    mask = (apart >= 0) & (apart < mixer.window) if mixer.near else apart >= 0
    if mixer.near:
        s = s + mixer.slopes[:, :, None, None] * apart
    if mixer.forget is not None:
        c = torch.nn.functional.logsigmoid(mixer.forget(call.hidden_BTD)).cumsum(1).permute(0, 2, 3, 1)
        s = s + c[..., :, None] - c[..., None, :]
    seen = mask.expand_as(s)
    if mixer.blocks:
        seen = _best_blocks(mixer, call, T) & seen
    if mixer.blocks:
        weights = _softmax(s, seen, call)
    else:
        rule, p, rows = RULES[mixer.row.fn.__name__], None if mixer.p is None else mixer.p[..., None], []
        for t in range(T):
            on = mask[t]
            w = rule(s[..., t, on], int(on.sum()), p)
            if call.sink_logit_GR is not None:
                w = w * torch.sigmoid(s[..., t, on].logsumexp(-1) - call.sink_logit_GR)[..., None]
            rows.append(torch.zeros(*s.shape[:3], T).masked_scatter(on.expand(*s.shape[:3], T), w))
        weights = torch.stack(rows, 3)
    out = _read(weights, call.v_BTGV)
    return out if mixer.gate is None else out * torch.sigmoid(mixer.gate(call.hidden_BTD)).unsqueeze(-1)


def _best_blocks(mixer: Full, call: AttentionCall, T: int) -> Tensor:
    size, k = mixer.BLOCK_KEYS, call.k_BTGK
    chosen = torch.zeros(k.shape[0], k.shape[2], call.q_BTGRK.shape[3], T, T, dtype=torch.bool)
    for t in range(T):
        own = t // size
        chosen[:, :, :, t, own * size :] = True
        if own:
            means = torch.stack([k[:, n * size : (n + 1) * size].mean(1) for n in range(own)], 1)
            score = torch.einsum("bgrk,bngk->bgrn", call.q_BTGRK[:, t], means)
            kept = score.topk(min(mixer.top - 1, own), -1).indices
            blocks = torch.zeros_like(score, dtype=torch.bool).scatter(-1, kept, True)
            chosen[:, :, :, t, : own * size] = blocks.repeat_interleave(size, -1)
    return chosen


def _entmax(z: Tensor, alpha: Tensor | float) -> Tensor:
    """relu((alpha - 1) z - tau)^(1 / (alpha - 1)), tau by bisection in fp64 and one differentiable Newton step."""
    z = z.double() * (alpha - 1)
    power = 1 / (alpha - 1)
    high = z.detach().amax(-1, keepdim=True)
    low = high - 1
    for _ in range(60):
        middle = (low + high) / 2
        enough = ((z.detach() - middle).relu() ** power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    gap = (z - low).relu()
    total = (gap**power).sum(-1, keepdim=True)
    slope = torch.where(gap > 0, power * gap.clamp_min(1e-300) ** (power - 1), 0.0).sum(-1, keepdim=True).detach()
    tau = low + (total - total.detach()) / slope
    return ((z - tau).relu() ** power).float()


def _self_adjusted(z: Tensor, n: int, p: Tensor | None) -> Tensor:
    low, high = z.amin(-1, keepdim=True).clamp_max(0), z.amax(-1, keepdim=True).clamp_min(0)
    return (z - low) / (high - low) * z.softmax(-1)


def _softpick(z: Tensor, n: int, p: Tensor | None) -> Tensor:
    """The 1e-8 stands beside exponentials of which the largest, or 1, has been taken out."""
    floor, lifted = 1e-8 * z.detach().amax(-1, keepdim=True).clamp_min(0).exp(), z.exp() - 1
    return lifted.relu() / (lifted.abs().sum(-1, keepdim=True) + floor)


def _over(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


# Name of the function in score_weights.py -> the same for the scores [.., n] of the keys a query sees.
RULES = {
    "softmax": lambda z, n, p: z.softmax(-1),
    "entmax15": lambda z, n, p: _entmax(z, 1.5),
    "sparsemax": lambda z, n, p: _entmax(z, 2.0),
    "entmax": lambda z, n, p: _entmax(z, 1.02 + 0.98 * torch.sigmoid(p)),
    "sigmoid": lambda z, n, p: torch.sigmoid(z + p - math.log(n)),
    "relu": lambda z, n, p: z.relu() / n,
    "softpick": _softpick,
    "scalable": lambda z, n, p: (p * z * math.log(max(n, 2))).softmax(-1),
    "self_adjusted": _self_adjusted,
    "power": lambda z, n, p: _over(z.square()),
    "softmax1": lambda z, n, p: z.exp() / (p.exp() + z.exp().sum(-1, keepdim=True)),
    "clipped": lambda z, n, p: ((1 + p / n) * z.softmax(-1) - p / n).clamp(0, 1),
}


def _native(mixer: NativeSparse, call: AttentionCall, s: Tensor, apart: Tensor) -> Tensor:
    size, T, causal = mixer.SIZE, s.shape[-1], apart >= 0
    window = _read(_softmax(s, causal & (apart < mixer.window), call), call.v_BTGV)
    count = -(-T // size)
    mean = [torch.stack([x[:, n * size : (n + 1) * size].mean(1) for n in range(count)], 1) for x in (call.k_BTGK, call.v_BTGV)]
    coarse = torch.einsum("btgrk,bngk->bgrtn", call.q_BTGRK, mean[0]) * call.scale
    if call.softcap is not None:
        coarse = call.softcap * torch.tanh(coarse / call.softcap)
    past = (torch.arange(count)[None] + 1) * size <= torch.arange(T)[:, None]
    compressed = _read(_softmax(coarse, past, call), mean[1])
    plain = coarse.masked_fill(~past, float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
    chosen = torch.zeros(*s.shape[:2], T, T, dtype=torch.bool)
    for t in range(T):
        own = t // size
        ranked = plain[:, :, t].clone()
        ranked[..., own + 1 :] = -1
        for n in {0, own, max(own - 1, 0)}:
            ranked[..., n] = 1e9
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, ranked.topk(min(mixer.top, count), -1).indices, True)
        chosen[:, :, t] = kept.repeat_interleave(size, -1)[..., :T]
    selected = _read(_softmax(s, causal & chosen.unsqueeze(2), call), call.v_BTGV)
    gate = torch.sigmoid(mixer.gate(call.hidden_BTD)).unsqueeze(-2)
    return gate[..., 0] * compressed + gate[..., 1] * selected + gate[..., 2] * window


def _delta(mixer: DeltaCorrection, call: AttentionCall, s: Tensor, apart: Tensor) -> Tensor:
    j = torch.arange(s.shape[-1])[None]
    window = _read(_softmax(s, (apart >= 0) & ((apart < mixer.window) | (j < mixer.sinks)), call), call.v_BTGV)
    full = _read(_softmax(s, apart >= 0, call), call.v_BTGV)
    anchor = torch.arange(s.shape[-1]) // mixer.stride * mixer.stride
    return window + (full - window)[:, anchor]
