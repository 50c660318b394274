"""What every mixer computes, written as sums over pairs of tokens or one token at a time: the oracle of the tests. No state, no padding, no chunks.

With W the window, N the sinks, s_tj = scale q_t.k_j (softcapped), near(t) = tokens t-W+1..t and the sinks 0..N-1, older(t) = N..t-W (all of 0..t
where combine is `alone` or `sequential`):

    window         o_t = sum_near e^s v / sum_near e^s
    w_tj           the linear branch's weight of j for t: phi_q(q_t).phi_k(k_j), faded by the decays between the step at which j is written and t
    joint          o_t = (sum_near e^s v + e^mu_t sum_older w v) / (the same without v)
    gated          o_t = (1 - g_t) window + g_t linear_t          added: window + g_t linear_t          alone: linear_t
    sequential     window over v'_j = v_j + g_j linear_j, linear_j over 0..j for the mean of the group's queries

With a sparse cache of C pairs a head, near(t) has those it holds as well, and older(t) is what it has let go (definition_cache.py).

linear_t is what normalisers.py and outputs.py make of w_t. As long as older(t) is empty, o_t is the window's. Key: as in cell.py; J tokens that are read.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.linearize.mixers.base import AttentionCall, Mixer
from subquad.linearize.mixers.cell import Cell
from subquad.linearize.mixers.combine import asked_once
from subquad.linearize.mixers.definition_cache import held_and_gone
from subquad.linearize.mixers.definition_full import full_definition
from subquad.linearize.mixers.definition_levels import delta_levels, level_weights
from subquad.linearize.mixers.definition_slots import slot_weights
from subquad.linearize.mixers.shared_key import SharedKey
from subquad.linearize.mixers.window import Window


def definition(mixer: Mixer, call: AttentionCall) -> Tensor:
    """o [B, T, G, R, V] of a call without state or padding, in the dtype of q; O(T^2)."""
    if isinstance(mixer, SharedKey):
        key = torch.einsum("btgk,g->btk", call.k_BTGK, mixer.share).unsqueeze(2)
        return window_attention(mixer, replace(call, k_BTGK=key.expand_as(call.k_BTGK)))[0]
    if isinstance(mixer, Window):
        return window_attention(mixer, call)[0]
    if not isinstance(mixer, Cell):
        return full_definition(mixer, call)
    T, alone = call.q_BTGRK.shape[1], mixer.pieces["combine"] == "alone"
    t, j = torch.arange(T)[:, None], torch.arange(T)[None]
    if mixer.pieces["combine"] == "sequential":
        linear = linear_branch(mixer, asked_once(call), j <= t).squeeze(3)
        return window_attention(
            mixer, replace(call, v_BTGV=call.v_BTGV + torch.sigmoid(mixer.enrich(call.hidden_BTD))[..., None] * linear)
        )[0]
    seen, older = near(mixer, T), (j <= t) if alone else (j <= t - mixer.window) & (j >= mixer.sinks)
    if mixer.pieces["cache"]:
        seen, older = held_and_gone(mixer, call, seen, older)
    some = (older if older.dim() == 2 else older[:, 0, 0]).any(-1).view(-1, T, 1, 1)  # tokens go in all heads at once
    if not alone:
        window, weights, extra = window_attention(mixer, call, seen)
    if mixer.rows.combine.joint:
        if mixer.rows.container.slots:
            similar, total = slot_weights(mixer, call, older)
            extra = extra + total - similar.sum(-1, keepdim=True)
        else:
            similar = weights_of(mixer, call, older)
        if mixer.pieces["combine"] == "joint":
            similar = similar * mixer.mix(call.hidden_BTD).exp().permute(0, 2, 3, 1)[..., None]
        if mixer.pieces["combine"] == "joint_top":
            similar = similar * top_of(call, seen).exp() / torch.sigmoid(mixer.factor)[None, :, :, None, None]
        both = weights + similar
        return _apply(both / (both.sum(-1, keepdim=True) + extra), call.v_BTGV)
    linear = linear_branch(mixer, call, older)
    if alone:
        return linear
    share = (torch.sigmoid(mixer.mix(call.hidden_BTD)) * some)[..., None]
    return window + share * linear if mixer.pieces["combine"] == "added" else (1 - share) * window + share * linear


def linear_branch(mixer: Cell, call: AttentionCall, older: Tensor) -> Tensor:
    if mixer.rows.container.slots:
        weights, total = slot_weights(mixer, call, older)
        linear = _apply(weights / total.clamp_min(1e-30), call.v_BTGV)
    elif mixer.pieces["write"] in ("delta", "momentum", "selective"):
        linear = _delta(mixer, call, older)
    else:
        linear = _normalised(mixer, call, weights_of(mixer, call, older), older)
    if mixer.output is not None:
        linear = mixer.output(linear, call.hidden_BTD)
    return linear if mixer.read_scale is None else linear * mixer.read_scale[..., None]


def near(mixer: Mixer, T: int) -> Tensor:
    t, j = torch.arange(T)[:, None], torch.arange(T)[None]
    return (j <= t) & ((j > t - mixer.window) | (j < mixer.sinks))


def top_of(call: AttentionCall, seen: Tensor) -> Tensor:
    """[B, G, R, T, 1]: the largest near score, as a constant."""
    top = scores_of(call).masked_fill(~seen, float("-inf")).amax(-1, keepdim=True).detach()
    return top if call.sink_logit_GR is None else torch.maximum(top, call.sink_logit_GR[None, :, :, None, None])


def scores_of(call: AttentionCall) -> Tensor:
    scores = torch.einsum("btgrk,bjgk->bgrtj", call.q_BTGRK, call.k_BTGK) * call.scale
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)


def window_attention(mixer: Mixer, call: AttentionCall, seen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | float]:
    """(output, e^s of near tokens [B, G, R, T, J], what a learned sink adds to their sum). seen: near tokens where they are not the mixer's window and sinks."""
    weights = scores_of(call).exp() * (near(mixer, call.q_BTGRK.shape[1]) if seen is None else seen)
    extra = 0.0 if call.sink_logit_GR is None else call.sink_logit_GR.exp()[None, :, :, None, None]
    return _apply(weights / (weights.sum(-1, keepdim=True) + extra), call.v_BTGV), weights, extra


def _apply(weights_BGRTJ: Tensor, v_BTGV: Tensor) -> Tensor:
    return torch.einsum("bgrtj,bjgv->btgrv", weights_BGRTJ, v_BTGV)


def _features(mixer: Cell, call: AttentionCall) -> tuple[Tensor, Tensor]:
    position = torch.arange(call.q_BTGRK.shape[1])[None].expand(call.q_BTGRK.shape[0], -1)
    q, k = mixer.map_q(mixer.asked(call), position), mixer.map_k(mixer.keys(call), position)
    q = q.exp() if "q" in mixer.rows.feature_map.exponential else q
    k = k.exp() if "k" in mixer.rows.feature_map.exponential else k
    if mixer.pieces["write"] == "convex":
        k = 1 - mixer.decay(call.k_BTGK).exp()
    if mixer.pieces["write"] == "step":
        k = k * mixer.decay.step(call.hidden_BTD)[..., None]
    if mixer.pieces["write"] == "dual":
        g, tau = mixer.decay.parts(call.hidden_BTD)
        k = k * g**tau
    return q, k


def _first(older: Tensor) -> Tensor:
    """[B or 1, J, G or 1]: the row at which token j is written, T where it never is."""
    first = older.shape[-1] - older.sum(-2)
    return first[None, :, None] if older.dim() == 2 else first[:, :, 0].transpose(1, 2)


def _fade(mixer: Cell, call: AttentionCall, older: Tensor) -> Tensor:
    """[B, T, J, G, 1 or F]: e^(sum of the log decays between the row at which j is written and t); only pairs of older(t) count."""
    T = call.q_BTGRK.shape[1]
    if mixer.decay is None:
        return torch.ones(1, T, T, 1, 1)
    a = mixer.decay(call.k_BTGK if mixer.rows.decay.reads == "key" else call.hidden_BTD)
    a = a if mixer.rows.decay.vector else a[..., None]
    first = _first(older)[..., None].expand(a.shape)  # [B, J, G, 1 or F]
    if mixer.rows.decay.clock == "own":  # the gate of the token that is written, at the row at which it is
        a = torch.zeros_like(torch.cat([a, a[:, :1]], 1)).scatter(1, first, a)[:, :T]
    total = a.cumsum(1)
    return (total[:, :, None] - total.gather(1, first.clamp_max(T - 1))[:, None]).clamp_max(0.0).exp()


def weights_of(mixer: Cell, call: AttentionCall, older: Tensor) -> Tensor:
    """[B, G, R, T, J]: w_tj, 0 outside older(t)."""
    q, k = _features(mixer, call)
    fade = _fade(mixer, call, older)
    if mixer.pieces["normaliser"] == "feature":
        return torch.einsum("btgrf,btjgf->bgrtj", q, _shares(k, older))
    if mixer.rows.position.phases:
        one = torch.ones(call.q_BTGRK.shape[:2])
        phase = mixer.phases(call.hidden_BTD, one, torch.zeros(1, 1, 1))
        apart = phase[:, :, None] - phase[:, None]  # [B, T, J, G, P]
        if mixer.rows.position.doubles:
            fade = fade * apart.cos()
        else:
            q, k = _turn(q, phase.unsqueeze(3)), _turn(k, phase)
    if fade.shape[-1] == 1:
        w = torch.einsum("btgrf,bjgf->bgrtj", q, k) * fade.squeeze(-1).permute(0, 3, 1, 2).unsqueeze(2)
    else:
        w = torch.einsum("btgrf,btjgf->bgrtj", q, k[:, None] * fade)
    if mixer.pieces["container"] == "partitions":
        route = mixer.routes(call.hidden_BTD)
        w = w * torch.einsum("btgp,bjgp->bgtj", route, route).unsqueeze(2)
    if mixer.pieces["container"] == "levels":
        w = w * level_weights(mixer, call).permute(0, 3, 4, 1, 2)
    if mixer.pieces["key_weight"] == "competition":
        w = w * _competition(q, mixer.keys(call)).permute(0, 2, 1)[:, :, None, None]
    return w * older


def _turn(x: Tensor, phase: Tensor) -> Tensor:
    """Pairs (first half, second half) as complex numbers, times e^(i phase)."""
    one, two = x.chunk(2, -1)
    turned = torch.complex(one, two) * torch.polar(torch.ones_like(phase), phase)
    return torch.cat([turned.real, turned.imag], -1)


def _shares(k: Tensor, older: Tensor) -> Tensor:
    """[B, T, J, G, F]: k_jr / sum_(l in older(t)) k_lr."""
    sums = torch.einsum("tj,bjgf->btgf", older.to(k.dtype), k).clamp_min(torch.finfo(torch.float32).tiny)
    return k[:, None] * older[None, :, :, None, None] / sums[:, :, None]


def _normalised(mixer: Cell, call: AttentionCall, w: Tensor, older: Tensor) -> Tensor:
    """The published weights, pair by pair, times v."""
    name, total = mixer.pieces["normaliser"], w.sum(-1, keepdim=True)
    n = older.sum(-1, keepdim=True).clamp_min(1).to(w.dtype)
    floor = mixer.rows.feature_map.floor
    if name == "sum":
        w = w / total.clamp_min(floor)
    elif name == "clamped":
        w = mixer.normalise.tau[:, :, None, None] * w / total.clamp_min(100.0)
    elif name == "centred":
        w = (w + (1 - total / n) * older) / n
    elif name == "magnitude":  # token means: w / n in the place of w, except in its own divisor
        w = (1 / n + 1 / total.clamp_min(floor)) * w - total / n.square() * older
    elif name == "magnitude_sum":
        w = (1 + 1 / total.clamp_min(floor)) * w - total / n * older
    elif name == "count":
        w = w * n ** -torch.sigmoid(mixer.normalise.power)[:, :, None, None]
    elif name == "mean":
        w = w / n
    elif name == "flow":
        q, k = _features(mixer, call)
        weight, outgoing = _flow(q, k)
        allocation = torch.einsum("btgrf,bjgf,bjg,tj->bgrt", q, k, 1 / outgoing, older.to(q.dtype))[..., None] / n
        w = torch.sigmoid(allocation) * w * weight.permute(0, 2, 1)[:, :, None, None] / total.clamp_min(floor)
    return _apply(w, call.v_BTGV)


def _competition(q: Tensor, k: Tensor) -> Tensor:
    """RALA's alpha [B, J, G]: each token's logit stays the one it had when it came."""
    means = [q[:, : j + 1].mean((1, 3)) for j in range(q.shape[1])]
    logits = torch.stack([(mean * k[:, j]).sum(-1) for j, mean in enumerate(means)], 1) / k.shape[-1] ** 0.5
    return torch.stack([logits[:, : j + 1].softmax(1)[:, -1] * (j + 1) for j in range(q.shape[1])], 1)


def _flow(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Flow-Attention's c [B, J, G] and O [B, J, G], from all pairs of queries i and keys j."""
    pairs, T = torch.einsum("bigrf,bjgf->bgrij", q, k), q.shape[1]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    incoming = (pairs * (j <= i)).sum(-1, keepdim=True) / (i + 1)
    outgoing = (pairs * (i <= j)).sum(-2).mean(2) / (j[0] + 1)
    competing = ((pairs / incoming * (i <= j)).sum(-2).mean(2) / (j[0] + 1)).clamp(-1, 1).exp()
    weight = torch.stack([competing[..., n] / competing[..., : n + 1].sum(-1) * (n + 1) for n in range(T)], 1)
    return weight, outgoing.transpose(1, 2)


def _delta(mixer: Cell, call: AttentionCall, older: Tensor) -> Tensor:
    q, k = _features(mixer, call)
    lag, first = (mixer.window, mixer.sinks) if mixer.rows.combine.older else (0, 0)
    if mixer.pieces["write"] == "selective":
        return _selective(mixer, call, q, k, lag, first)
    beta = torch.sigmoid(mixer.beta(call.hidden_BTD)).squeeze(-1)
    a = torch.zeros_like(beta) if mixer.decay is None else mixer.decay(call.hidden_BTD)
    if mixer.pieces["write"] == "momentum":
        return _momentum(mixer, call, q, k, beta, a, lag, first)
    T, v, out = q.shape[1], call.v_BTGV, []
    new = older & ~torch.cat([torch.zeros_like(older[..., :1, :]), older[..., :-1, :]], -2)  # [.., T, J]: written at t, one token at most
    new = new.to(q.dtype).expand(k.shape[0], k.shape[2], 1, T, T).squeeze(2)  # [B, G, T, J]
    if mixer.pieces["container"] == "levels":
        return delta_levels(mixer, call, q, k, beta, a, new)
    state = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    for t in range(T):
        at = new[:, :, t]
        k_t, v_t = (torch.einsum("bgj,bjgf->bgf", at, x) for x in (k, v))
        fade = a[:, t] if mixer.rows.decay.clock == "now" else torch.einsum("bgj,bjg->bg", at, a)
        state = state * fade[..., None, None].exp()
        wrong = v_t - torch.einsum("bgf,bgfv->bgv", k_t, state)
        state = state + k_t[..., None] * (torch.einsum("bgj,bjg->bg", at, beta)[..., None] * wrong)[:, :, None]
        out.append(torch.einsum("bgrf,bgfv->bgrv", q[:, t], state))
    return torch.stack(out, 1)


def _momentum(mixer: Cell, call: AttentionCall, q: Tensor, k: Tensor, beta: Tensor, a: Tensor, lag: int, first: int) -> Tensor:
    """Titans' linear memory: M_j = a_j M_(j-1) + P_j, P_j = eta_j P_(j-1) - beta_j grad |M_(j-1)^T k_j - v_j|^2 / 2."""
    eta, v = torch.sigmoid(mixer.eta(call.hidden_BTD)).squeeze(-1), call.v_BTGV
    M = P = torch.zeros(k.shape[0], *k.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        j = t - lag
        if j >= first:
            gradient = torch.einsum("bgf,bgv->bgfv", k[:, j], torch.einsum("bgfv,bgf->bgv", M, k[:, j]) - v[:, j])
            P = eta[:, j, :, None, None] * P - beta[:, j, :, None, None] * gradient
            M = a[:, j, :, None, None].exp() * M + P
        out.append(torch.einsum("bgfv,bgrf->bgrv", M, q[:, t]))
    return torch.stack(out, 1)


def _selective(mixer: Cell, call: AttentionCall, q: Tensor, k: Tensor, lag: int, first: int) -> Tensor:
    """Mamba-1: the weight of j for t in channel v is sum_f q_tf k_jf dt_jv e^(-A_fv (dt_(j+1)v + .. + dt_tv)), over the tokens written by t."""
    dt, T = torch.nn.functional.softplus(mixer.dt(call.hidden_BTD)), q.shape[1]
    total = torch.where(torch.arange(T)[:, None, None] >= first, dt, 0.0).cumsum(1)
    A, written = mixer.log_a.exp(), dt * call.v_BTGV

    def row(t: int) -> Tensor:
        j = torch.arange(first, max(t - lag + 1, first))
        if len(j) == 0:
            return torch.zeros(*q.shape[:1], *q.shape[2:4], call.v_BTGV.shape[-1])
        gone = total[:, t - lag, None] - total[:, j]  # [B, J, G, V]
        fade = torch.exp(-A * gone[:, :, :, None])  # [B, J, G, F, V]
        return (((q[:, t, None] * k[:, j, :, None]) @ fade) * written[:, j, :, None]).sum(1)

    # A row's numbers, J F V of them, are made again for its gradient: of 500 tokens they would take 80 GB.
    out = [checkpoint(row, t, use_reentrant=False, preserve_rng_state=False) for t in range(T)]
    return torch.stack(out, 1)
