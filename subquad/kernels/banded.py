"""Op 3: attention over a band of keys (the last `window` tokens) and a few sink tokens, returned un-normalised so that branches merge.

    s_ij = softcap(scale q_i.k_j)                 softcap(x) = cap tanh(x / cap) when a cap is given
    m_i  = max_j s_ij,  numerator_i = sum_j exp(s_ij - m_i) v_j,  denominator_i = sum_j exp(s_ij - m_i)     other weights: weights.py

The keys come extended to the left by what the window still holds of earlier tokens: slot w + t is new token t, and query t sees slots
t+1 .. t+w (itself included: `window` tokens), as far as they are valid, plus every sink that has already left the window.

SEEDS C04, C05, J01; 0.2 and 0.16 for the merge. Key: B batch, T new tokens, W window, N sinks, G key/value heads, R query heads per key/value
head, K key size, V value size, C queries of a block, n blocks, X = W + T extended slots, J what a block has before it: sinks, then slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.weights import band_weights

BLOCK = 64


def banded_definition(
    q_BTGRK, k_BJGK, v_BJGV, seen_BTJ, *, scale, window=1, weight="softmax", softcap=None, bias_BGTJ=None, sink_logit_GR=None, normalise=False
):
    """The formula with every pair written out, in the dtype of q; query t attends where seen_BTJ [B or 1, T, J] is True. Results as `banded_blocks`."""
    scores = torch.einsum("btgrk,bjgk->bgrtj", q_BTGRK, k_BJGK) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias_BGTJ is not None:
        scores = scores + bias_BGTJ.unsqueeze(2)
    logit = None if sink_logit_GR is None else sink_logit_GR.unsqueeze(-1)
    weights, denominator, top = band_weights(weight, scores, seen_BTJ[:, None, None], window, logit, normalise)
    return torch.einsum("bgrtj,bjgv->btgrv", weights, v_BJGV), denominator.permute(0, 3, 1, 2), top.permute(0, 3, 1, 2)


def banded_blocks(
    q_BTGRK: Tensor,
    k_BXGK: Tensor,
    v_BXGV: Tensor,
    *,
    window: int,
    scale: float,
    weight: str = "softmax",
    valid_BX: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_seen_BTN: Tensor | None = None,
    fade_BXG: Tensor | None = None,
    sink_fade_BNG: Tensor | None = None,
    softcap: float | None = None,
    sink_logit_GR: Tensor | None = None,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocked form: queries in blocks of at least `window`, each against the sinks, the previous and its own block: O(T W), not O(T^2).

    q [B, T, G, R, K], k and v [B, X, G, K | V] in the model's dtype; valid_BX bool (False: empty slot); sink_k, sink_v [B, N, G, K | V]
    with sink_seen_BTN bool (True: the query attends to that sink); fade_BXG, sink_fade_BNG: running sums of log forget gates, of which a pair's
    score takes the query's less the key's; sink_logit_GR: a learned logit that takes weight but has no value.
    Returns numerator [B, T, G, R, V], denominator [B, T, G, R] and the maximum [B, T, G, R], all fp32. A query that sees nothing gets zeros.
    normalise: as in ops.banded.
    """
    T = q_BTGRK.shape[1]
    before = k_BXGK.shape[1] - T
    C = min(T, max(window, BLOCK))
    back = C if C < T else min(before, window - 1)  # slots in front of a block's own
    k, v = _slot_blocks(k_BXGK, T, C, back, sink_k), _slot_blocks(v_BXGV, T, C, back, sink_v)  # [B, G, n, J, K | V]
    fade = None
    if fade_BXG is not None:
        at_query = query_blocks(fade_BXG[:, before:, :, None, None], C)
        at_key = _slot_blocks(fade_BXG[..., None], T, C, back, None if sink_fade_BNG is None else sink_fade_BNG[..., None])
        fade = at_query - at_key.transpose(-1, -2).unsqueeze(3)
    valid_BX = torch.ones(1, before + T, dtype=torch.bool, device=k.device) if valid_BX is None else valid_BX
    seen = _seen_blocks(valid_BX, T, C, back, window, sink_seen_BTN)
    logit = None if sink_logit_GR is None else sink_logit_GR.float()[:, None, :, None]
    return attend_blocks(
        q_BTGRK, k, v, seen[:, None], scale=scale, weight=weight, window=window, softcap=softcap, bias_BGnRCJ=fade, sink_logit=logit,
        normalise=normalise,
    )


def attend_blocks(
    q_BTGRK: Tensor,
    k_BGnJK: Tensor,
    v_BGnJV: Tensor,
    seen_BGnCJ: Tensor,
    *,
    scale: float,
    weight: str = "softmax",
    window: int = 1,
    softcap: float | None = None,
    bias_BGnRCJ: Tensor | None = None,
    sink_logit: Tensor | None = None,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries in blocks of C, each against the J keys gathered for it where seen (broadcasts). Results as `banded_blocks`."""
    T, R, C = q_BTGRK.shape[1], q_BTGRK.shape[3], seen_BGnCJ.shape[3]
    q, k, v = query_blocks(q_BTGRK, C).flatten(3, 4), k_BGnJK, v_BGnJV  # [B, G, n, R C, K]
    if q.device.type == "cpu":  # bf16 products of this size took 5 times as long as fp32 ones (docs/log.md, 2026-11-27)
        q, k, v = q.float(), k.float(), v.float()
    scores = (q @ k.transpose(-1, -2)).float().unflatten(3, (R, C)) * scale  # [B, G, n, R, C, J]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias_BGnRCJ is not None:
        scores = scores + bias_BGnRCJ
    weights, denominator, top = band_weights(weight, scores, seen_BGnCJ.unsqueeze(3), window, sink_logit, normalise)
    numerator = (weights.to(v.dtype).flatten(3, 4) @ v).float().unflatten(3, (R, C))
    numerator, denominator, top = (x.movedim((2, 4), (1, 2)).flatten(1, 2)[:, :T] for x in (numerator, denominator, top))
    return numerator, denominator, top


def query_blocks(x_BTGRK: Tensor, C: int) -> Tensor:
    """[B, G, n, R, C, K], zeros after the last token."""
    x = F.pad(x_BTGRK, (0, 0, 0, 0, 0, 0, 0, -x_BTGRK.shape[1] % C))
    return x.unflatten(1, (-1, C)).permute(0, 3, 1, 4, 2, 5)


def _slot_blocks(x_BXGK: Tensor, T: int, C: int, back: int, sinks_BNGK: Tensor | None = None) -> Tensor:
    """[B, G, n, J, K]: what each block of C queries has before it: the sinks, `back` slots, the C of its own tokens. Zeros outside the sequence."""
    before = x_BXGK.shape[1] - T
    x = x_BXGK.transpose(1, 2)[:, :, max(before - back, 0) :]
    x = F.pad(x, (0, 0, max(back - before, 0), -T % C))
    if C == T:
        parts = [x.unsqueeze(2)]
    else:  # back is C
        x = x.unflatten(2, (-1, C))
        parts = [x[:, :, :-1], x[:, :, 1:]]
    if sinks_BNGK is not None:
        parts.insert(0, sinks_BNGK.transpose(1, 2).unsqueeze(2).expand(-1, -1, parts[0].shape[2], -1, -1))
    return torch.cat(parts, 3)


def _seen_blocks(valid_BX: Tensor, T: int, C: int, back: int, window: int, sink_seen_BTN: Tensor | None) -> Tensor:
    """[B or 1, n, C, J] bool."""
    t = torch.arange(C, device=valid_BX.device)[:, None]
    slot = torch.arange(-back, C, device=valid_BX.device)
    band = (slot <= t) & (slot > t - window)
    seen = band & _slot_blocks(valid_BX[..., None, None], T, C, back)[:, 0, :, None, :, 0]
    if sink_seen_BTN is None:
        return seen
    sinks = F.pad(sink_seen_BTN, (0, 0, 0, -T % C)).unflatten(1, (-1, C))
    return torch.cat([sinks, seen.expand(sinks.shape[0], -1, -1, -1)], -1)
