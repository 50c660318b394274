"""Op 3: softmax attention over a band of keys (the last `window` tokens) and a few sink tokens, returned un-normalised so that branches merge.

    s_ij = softcap(scale q_i.k_j)                 softcap(x) = cap tanh(x / cap) when a cap is given
    m_i  = max_j s_ij,  numerator_i = sum_j exp(s_ij - m_i) v_j,  denominator_i = sum_j exp(s_ij - m_i)

The keys come extended to the left by what the window still holds of earlier tokens: slot w + t is new token t, and query t sees slots
t+1 .. t+w (itself included: `window` tokens), as far as they are valid, plus every sink that has already left the window.

SEEDS C04, C05, J01; 0.2 and 0.16 for the merge. Key: B batch, T new tokens, W window, N sinks, G key/value heads, R query heads per key/value
head, K key size, V value size, C block size, X = W + T extended slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def band_mask(T: int, X: int, window: int, valid_BX: Tensor | None, device) -> Tensor:
    """[B or 1, T, X] bool: query t sees slot j. `X - T` slots come before the first new token."""
    t = torch.arange(T, device=device)[:, None] + (X - T)
    j = torch.arange(X, device=device)[None]
    band = ((j <= t) & (j > t - window))[None]
    return band if valid_BX is None else band & valid_BX[:, None]


def banded_definition(
    q_BTGRK, k_BXGK, v_BXGV, *, window, scale, valid_BX=None, sink_k=None, sink_v=None, sink_seen_BTN=None, softcap=None, sink_logit_GR=None
):
    """The formula with every pair of query and slot written out. Oracle for tests. Arguments and results as `banded_blocks`."""
    T, X = q_BTGRK.shape[1], k_BXGK.shape[1]
    mask = band_mask(T, X, window, valid_BX, q_BTGRK.device)
    keys, values = k_BXGK, v_BXGV
    if sink_k is not None:
        keys, values = torch.cat([sink_k, keys], 1), torch.cat([sink_v, values], 1)
        mask = torch.cat([sink_seen_BTN, mask.expand(sink_seen_BTN.shape[0], -1, -1)], -1)
    scores = torch.einsum("btgrk,bxgk->btgrx", q_BTGRK, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, :, None, None], float("-inf"))
    top = scores.amax(-1)
    if sink_logit_GR is not None:
        top = torch.maximum(top, sink_logit_GR.to(top.dtype))
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (scores - top[..., None]).exp()
    denominator = weights.sum(-1)
    if sink_logit_GR is not None:
        denominator = denominator + (sink_logit_GR - top).exp()
    return torch.einsum("btgrx,bxgv->btgrv", weights, values), denominator, top


def banded_blocks(
    q_BTGRK: Tensor,
    k_BXGK: Tensor,
    v_BXGV: Tensor,
    *,
    window: int,
    scale: float,
    valid_BX: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_seen_BTN: Tensor | None = None,
    softcap: float | None = None,
    sink_logit_GR: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocked form: queries in blocks of at least `window`, each against its own and the previous block: O(T W), not O(T^2).

    q [B, T, G, R, K], k and v [B, X, G, K | V] in the model's dtype; valid_BX bool (False: empty slot); sink_k, sink_v [B, N, G, K | V]
    with sink_seen_BTN bool (True: the query attends to that sink); sink_logit_GR: a learned logit that takes weight but has no value.
    Returns numerator [B, T, G, R, V], denominator [B, T, G, R] and the maximum [B, T, G, R], all fp32. A query that sees nothing gets zeros.
    """
    B, T, G, R, K = q_BTGRK.shape
    X = k_BXGK.shape[1]
    q = q_BTGRK.permute(0, 2, 3, 1, 4)  # [B, G, R, T, K]
    k, v = k_BXGK.transpose(1, 2), v_BXGV.transpose(1, 2)  # [B, G, X, K | V]
    C = max(window, BLOCK)
    single = T <= C
    if single:
        first = max(X - T - window + 1, 0)  # older slots are outside every query's window
        k, v = k[:, :, first:], v[:, :, first:]
        valid = None if valid_BX is None else valid_BX[:, first:]
        mask = band_mask(T, X - first, window, valid, q.device)[:, None, None, None]  # [B, 1, 1, 1, T, X]
        q, k, v = q.unsqueeze(3), k.unsqueeze(2), v.unsqueeze(2)  # one block
    else:
        q, k, v, mask = _blocks(q, k, v, valid_BX, X - T, window, C)
    # q [B, G, R, n, C, K], k and v [B, G, n, Y, K | V], mask [B, 1, 1, n, C, Y]
    scores = _scores(q, k.unsqueeze(2), scale, softcap).masked_fill(~mask, float("-inf"))
    top = scores.amax(-1)
    sink_scores = None
    if sink_k is not None and sink_k.shape[1]:
        flat = q.flatten(3, 4)[:, :, :, :T]
        sink_scores = _scores(flat, sink_k.transpose(1, 2).unsqueeze(2), scale, softcap)
        sink_scores = sink_scores.masked_fill(~sink_seen_BTN[:, None, None], float("-inf"))  # [B, G, R, T, N]
        sink_top = _pad_tokens(sink_scores.amax(-1), q.shape[3] * q.shape[4], float("-inf")).unflatten(3, q.shape[3:5])
        top = torch.maximum(top, sink_top)
    if sink_logit_GR is not None:
        top = torch.maximum(top, sink_logit_GR.float()[None, :, :, None, None])
    # The maximum cancels in every ratio of numerator and denominator; without gradient it costs nothing and changes nothing.
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    weights = (scores - top.unsqueeze(-1)).exp()
    numerator = (weights.to(v.dtype) @ v.unsqueeze(2)).float().flatten(3, 4)[:, :, :, :T]
    denominator = weights.sum(-1).flatten(3, 4)[:, :, :, :T]
    top = top.flatten(3, 4)[:, :, :, :T]
    if sink_scores is not None:
        sink_weights = (sink_scores - top.unsqueeze(-1)).exp()
        numerator = numerator + (sink_weights.to(sink_v.dtype) @ sink_v.transpose(1, 2).unsqueeze(2)).float()
        denominator = denominator + sink_weights.sum(-1)
    if sink_logit_GR is not None:
        denominator = denominator + (sink_logit_GR.float()[None, :, :, None] - top).exp()
    return numerator.permute(0, 3, 1, 2, 4), denominator.permute(0, 3, 1, 2), top.permute(0, 3, 1, 2)


def _pad_tokens(x: Tensor, length: int, value: float) -> Tensor:
    return F.pad(x, (0, length - x.shape[-1]), value=value)


def _blocks(q, k, v, valid_BX, before, window, C):
    """Cut into blocks of C queries; block n sees C slots before it and its own C slots.

    `before` = X - T slots precede the first query. They are trimmed or padded to exactly C so that block n starts at slot C + n C.
    """
    T = q.shape[3]
    n = -(-T // C)
    tail = n * C - T
    if before > C:
        k, v = k[:, :, before - C :], v[:, :, before - C :]
        valid_BX = None if valid_BX is None else valid_BX[:, before - C :]
        before = C
    left = C - before
    if valid_BX is None:
        valid_BX = torch.ones(1, before + T, dtype=torch.bool, device=q.device)
    valid = F.pad(valid_BX, (left, tail), value=False).unflatten(1, (n + 1, C))  # [B, n+1, C]
    q = F.pad(q, (0, 0, 0, tail)).unflatten(3, (n, C))
    k = F.pad(k, (0, 0, left, tail)).unflatten(2, (n + 1, C))
    v = F.pad(v, (0, 0, left, tail)).unflatten(2, (n + 1, C))
    k, v = torch.cat([k[:, :, :-1], k[:, :, 1:]], 3), torch.cat([v[:, :, :-1], v[:, :, 1:]], 3)
    valid = torch.cat([valid[:, :-1], valid[:, 1:]], 2)  # [B, n, 2C]
    mask = band_mask(C, 2 * C, window, None, q.device) & valid[:, :, None]  # [B, n, C, 2C]
    return q, k, v, mask[:, None, None]
