"""The cell with a sparse cache, token by token: who is held, who goes, and what the state of those that went answers. The oracle of sparse_cache.py.

Key: as in definition.py; V1 = V + 1.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.sparse_cache import SHARP


def walk(mixer, call: AttentionCall) -> tuple[Tensor, list[list[list[int | None]]]]:
    """(near [B, G, 1, T, J]: window, sinks and cache of each head; the token written at each row of each head, or None)."""
    B, T, G = call.k_BTGK.shape[:3]
    errors = recall_errors(mixer, call)
    near, written = torch.zeros(B, G, 1, T, T, dtype=torch.bool), []
    for b in range(B):
        written.append([])
        for g in range(G):
            held: list[int] = []
            written[b].append([])
            for t in range(T):
                leaves, gone = t - mixer.window, None
                if leaves >= mixer.sinks:
                    held.append(leaves)
                    if len(held) > mixer.pieces["cache"]:
                        gone = min(held, key=lambda j: errors[b, j, g].item())
                        held.remove(gone)
                written[b][g].append(gone)
                seen = {*range(max(0, leaves + 1), t + 1), *range(min(mixer.sinks, t + 1)), *held}
                near[b, g, 0, t, sorted(seen)] = True
    return near, written


def written_any(written) -> list[list[bool]]:
    """[B][T]: something has been written by row t; it happens in all heads at once."""
    return [[any(j is not None for j in row[0][: t + 1]) for t in range(len(row[0]))] for row in written]


def recall_errors(mixer, call: AttentionCall) -> Tensor:
    """[B, J, G]: |mean of earlier values weighted by phi(k_j).phi(k) - v_j| over the tokens that leave the window before j."""
    k, v, T = call.k_BTGK.detach() * SHARP, call.v_BTGV.detach(), call.k_BTGK.shape[1]
    phi = torch.cat([k.softmax(-1), (-k).softmax(-1)], -1)
    j = torch.arange(T)
    w = torch.einsum("bjgf,bigf->bgji", phi, phi) * ((j[None] < j[:, None]) & (j[None] >= mixer.sinks))
    guess = torch.einsum("bgji,bigv->bjgv", w, v) / w.sum(-1).clamp_min(1e-30).permute(0, 2, 1).unsqueeze(-1)
    return (guess - v).norm(dim=-1)


def answers(mixer, call: AttentionCall, q: Tensor, k: Tensor, written) -> tuple[Tensor, Tensor]:
    """(what the state gives [B, T, G, R, V], its total [B, T, G, R]) of features q, k."""
    B, T, G = k.shape[:3]
    v = torch.cat([call.v_BTGV, torch.ones_like(call.v_BTGV[..., :1])], -1)
    a = None if mixer.decay is None else mixer.decay(call.k_BTGK if mixer.rows.decay.reads == "key" else call.hidden_BTD)
    a = a if a is None or mixer.rows.decay.vector else a.unsqueeze(-1)
    beta = torch.sigmoid(mixer.beta(call.hidden_BTD)) if mixer.rows.write.corrects else None
    out = []
    for b in range(B):
        for g in range(G):
            S = q.new_zeros(k.shape[-1], v.shape[-1])
            for t in range(T):
                j = written[b][g][t]
                now = mixer.rows.decay.clock == "now"
                if a is not None and (now or j is not None):
                    S = S * a[b, t if now else j, g].exp().unsqueeze(-1)
                if j is not None:
                    wrong = v[b, j, g] if beta is None else beta[b, j, g] * (v[b, j, g] - S.T @ k[b, j, g])
                    S = S + k[b, j, g][:, None] * wrong
                out.append(q[b, t, g] @ S)
    y = torch.stack(out).view(B, G, T, *out[0].shape).transpose(1, 2)
    return y[..., :-1], y[..., -1]
