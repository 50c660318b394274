"""The sparse cache, token by token: which pairs are held and which have gone. The oracle of sparse_cache.py.

Key: as in definition.py.
"""

import torch
from torch import Tensor

from subquad.linearize.mixers.base import AttentionCall
from subquad.linearize.mixers.sparse_cache import SHARP


def held_and_gone(mixer, call: AttentionCall, near: Tensor, older: Tensor) -> tuple[Tensor, Tensor]:
    """near and older [T, J] without a cache -> with it, [B, G, 1, T, J]: a token that leaves the window joins the held ones, of which the one with the
    smallest error goes when there are more than `cache`.
    """
    T, (B, _, G, _) = len(near), call.k_BTGK.shape
    errors, near, gone = recall_errors(call, older), near.expand(B, G, 1, T, T).clone(), torch.zeros(B, G, 1, T, T, dtype=torch.bool)
    for b in range(B):
        for g in range(G):
            held: list[int] = []
            out: list[int] = []
            for t in range(T):
                if older[t].any():
                    held.append(t - mixer.window)
                if len(held) > mixer.pieces["cache"]:
                    out.append(min(held, key=lambda j: errors[b, j, g].item()))
                    held.remove(out[-1])
                near[b, g, 0, t, held] = True
                gone[b, g, 0, t, out] = True
    return near, gone


def recall_errors(call: AttentionCall, older: Tensor) -> Tensor:
    """[B, J, G]: |mean of the values that left the window before j, weighted by phi(k_j).phi(k), less v_j|."""
    k, v = call.k_BTGK.detach() * SHARP, call.v_BTGV.detach()
    phi = torch.cat([k.softmax(-1), (-k).softmax(-1)], -1)
    before = older.any(0)[None] & torch.ones_like(older).tril(-1)  # of the tokens that ever leave
    w = torch.einsum("bjgf,bigf->bgji", phi, phi) * before
    guess = torch.einsum("bgji,bigv->bjgv", w, v) / w.sum(-1).clamp_min(1e-30).permute(0, 2, 1).unsqueeze(-1)
    return (guess - v).norm(dim=-1)
