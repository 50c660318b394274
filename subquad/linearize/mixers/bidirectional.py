"""The cell without a direction: every token reads every real token of its row (SEEDS 3.2 K10). For encoders; no window, no state.

Without decay the state is one total sum. With decay (LION) two scans meet, A_ij = q_i.k_j prod of the decays between i and j, the diagonal once;
a decay belongs to the token that is written: a_j .. a_(i-1) for j < i, a_(i+1) .. a_j for j > i (SEEDS 0.9).

Key: as in cell.py.
"""

import torch
from torch import Tensor

from subquad.kernels.ops import additive
from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.key_weights import NOTHING
from subquad.linearize.mixers.normalisers import Sums
from subquad.linearize.mixers.stream import positions, real, seen


def whole_sequence(cell, call: AttentionCall) -> Tensor:
    """o [B, T, G, R, V] fp32 of a cell whose combine is `alone`."""
    position, on = positions(call, seen(call)), real(call)
    q, k = cell.map_q(cell.asked(call), position), cell.map_k(cell.keys(call), position)
    rows, exponential = cell.rows, cell.rows.feature_map.exponential
    if "q" in exponential:
        q = (q - q.amax(-1, keepdim=True).detach()).exp()
    if "k" in exponential:
        k = k.masked_fill(~on[..., None, None], NOTHING)
        k = (k - k.amax((1, 3), keepdim=True).detach()).exp()
    mask = on[..., None, None].float()
    k, n = k * mask, on.sum(1).clamp_min(1).float()
    v, weighed = call.v_BTGV.float() * mask, {}
    value = v
    if rows.key_weight.rule is not None:
        weighed = rows.key_weight.rule.of_all(q, k, cell.keys(call).float(), on.float())
        if rows.key_weight.on == "key":
            k = k * weighed["weight"]
        else:
            value = v * weighed["weight"]
    if cell.has_total:
        value = torch.cat([value, torch.ones_like(v[..., :1])], -1)
    if rows.normaliser.per_feature:
        q = q / k.sum(1).clamp_min(torch.finfo(torch.float32).tiny)[:, None, :, None]
    y = _scans(q, k, value, cell.decay(call.hidden_BTD) * mask[..., 0]) if cell.decay is not None else _total(q, k, value)
    V = v.shape[-1]
    u = v.sum(1)[:, None].expand_as(v)
    total, eps = y[..., V] if cell.has_total else None, rows.feature_map.floor
    sums = Sums(y[..., :V], total, u, n[:, None].expand(on.shape), weighed.get("allocation"), eps)
    out = cell.normalise(sums)
    return out if cell.output is None else cell.output(out, call.hidden_BTD)


def _total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("btgrf,bgfv->btgrv", q, torch.einsum("btgf,btgv->bgfv", k, v))


def _scans(q: Tensor, k: Tensor, v: Tensor, log_BTG: Tensor) -> Tensor:
    """Forward and backward scan, the own token once. `log_BTG` is 0 at filler, which comes last in every row."""
    heads = q.flatten(2, 3)
    ahead = additive(heads, k, v, _late(log_BTG))[0]
    back = additive(heads.flip(1), k.flip(1), v.flip(1), _late(log_BTG.flip(1)))[0].flip(1)
    ahead, back = (x.unflatten(2, q.shape[2:4]) for x in (ahead, back))
    own = (q * k.unsqueeze(3)).sum(-1, keepdim=True) * v.unsqueeze(3)
    return ahead + back - own


def _late(log_BTG: Tensor) -> Tensor:
    """Decays one step later: what a token writes fades by its own decay first."""
    return torch.cat([torch.zeros_like(log_BTG[:, :1]), log_BTG[:, :-1]], 1)
