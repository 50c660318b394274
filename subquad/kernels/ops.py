"""The ops: one public function each, the same arguments and results on every backend.

    definition   the equation, pair by pair or token by token, in the dtype of the inputs: the oracle
    torch        blocked and chunkwise forms out of torch's own operations: any device, second choice everywhere
    cpu          C++ compiled on first use (AVX-512, AVX2 or portable)
    triton       GPUs, when asked for by name

Query head h belongs to key/value head h // (H / G); keys are never repeated. States, normalisers and log decays are fp32 whatever the inputs.
`cu_seqlens` [N + 1] (int, from 0 to T) packs N sequences into one row (B = 1); states then have N rows. `backend="auto"` takes cpu for
tensors in main memory where it can, torch otherwise, and logs once per op what it took; a backend asked for by name that cannot run is a UserError that says why.

`feature_map` (additive, window_linear): a row of features.FUSED. Queries and keys of the linear sums are then the numbers y [.., Y] that the map is
applied to, inside the kernel: features are in no tensor, nor are they saved for backward. States and vector decays have F = features of Y.

Key: B batch, T tokens, X = T + slots before the first token, H query heads, G key/value heads, K key size, V value size, F features, Y numbers before
a feature map (F without one), N sequences or sinks, W window.
"""

import torch
from torch import Tensor

from subquad.kernels.dispatch import call, quick
from subquad.kernels.features import FUSED, signs
from subquad.kernels.shapes import agree, decay, sequences
from subquad.registry import check_name


def _run(op: str, backend: str, given: dict, more: dict, sizes: dict[str, int], **settings):
    """Check that sizes agree, then run: tensors of `given` {name: (tensor or None, letters)} by position, of `more` by name."""
    agree(op, given | more, **sizes)
    return call(op, backend, *(x for x, _ in given.values()), **{name: x for name, (x, _) in more.items()}, **settings)


def _features(size: int, feature_map: str | None) -> int:
    if feature_map is not None:
        check_name("feature map in a kernel", feature_map, FUSED)
    return size * signs(feature_map)


def additive(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    feature_map: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) * S_{t-1} + phi(k_t) v_t^T;  o_t = scale S_t^T phi(q_t)   (SEEDS 3.1); phi = the identity without a feature map.

    log_decay: None, [B, T, G] or [B, T, G, F], natural log, <= 0, any size. initial_state [N, G, F, V] fp32.
    Returns (o [B, T, H, V] in out_dtype (None: the dtype of v), final state [N, G, F, V] fp32 or None). Differentiable in every tensor.
    """
    if cu_seqlens is None and out_dtype is None:
        tensors = q_BTHK, k_BTGK, v_BTGV, None, log_decay, initial_state
        found = quick("additive", backend, tensors, (scale, output_final_state), feature_map)
        if found is not None:
            return found
    sizes = dict(N=sequences(q_BTHK, cu_seqlens), F=_features(q_BTHK.shape[-1], feature_map))
    given = dict(q=(q_BTHK, "BTHY"), k=(k_BTGK, "BTGY"), v=(v_BTGV, "BTGV"), log_decay=decay(log_decay, "BTGF"))
    return _run(
        "additive", backend, given, dict(initial_state=(initial_state, "NGFV")), sizes, scale=scale, output_final_state=output_final_state,
        cu_seqlens=cu_seqlens, out_dtype=out_dtype, feature_map=feature_map,
    )  # fmt: skip


def delta(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    beta_BTG: Tensor,
    log_decay_BTG: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T;  o_t = scale S_t^T q_t   (SEEDS B01). k has unit length.

    Arguments and results otherwise as `additive`; beta in [0, 1]. Differentiable in every tensor.
    """
    if cu_seqlens is None and out_dtype is None:
        tensors = q_BTHK, k_BTGK, v_BTGV, beta_BTG, log_decay_BTG, initial_state
        found = quick("delta", backend, tensors, (scale, output_final_state))
        if found is not None:
            return found
    given = dict(q=(q_BTHK, "BTHK"), k=(k_BTGK, "BTGK"), v=(v_BTGV, "BTGV"), beta=(beta_BTG, "BTG"), log_decay=(log_decay_BTG, "BTG"))
    return _run(
        "delta", backend, given, dict(initial_state=(initial_state, "NGKV")), dict(N=sequences(q_BTHK, cu_seqlens)),
        scale=scale, output_final_state=output_final_state, cu_seqlens=cu_seqlens, out_dtype=out_dtype,
    )  # fmt: skip


def banded(
    q_BTHK: Tensor,
    k_BXGK: Tensor,
    v_BXGV: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    weight: str = "softmax",
    log_forget_BXG: Tensor | None = None,
    position: int = 0,
    sink_k_BNGK: Tensor | None = None,
    sink_v_BNGV: Tensor | None = None,
    softcap: float | None = None,
    sink_logit_H: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalise: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the last `window` tokens (the query's own included) and the first `sinks` tokens of the sequence, un-normalised.

    numerator_t = sum_j w_tj v_j, denominator_t, maximum_t (all fp32: [B, T, H, V], [B, T, H], [B, T, H]); the output is numerator / denominator, two
    branches merge after multiplying each by exp(its maximum - the common one). weight, with s_tj = softcap(scale q_t.k_j), m_t = max_j s_tj:
      softmax   w = exp(s - m), denominator = sum w
      softmax1  the same with exp(-m) added to the denominator (m >= 0): a sink without value
      softpick  w = relu(exp(s - m) - exp(-m)), denominator = sum |exp(s - m) - exp(-m)| + 1e-6
      sigmoid   w = sigmoid(s - log window), denominator 1, m = 0
      forget    softmax of s_tj + f_(j+1) + .. + f_t with log_forget f [B, X, G] <= 0 (a sink that is given by itself counts from slot 0)
      entmax    1.5-entmax weights, denominator 1, m = 0

    X - T slots before the first query belong to earlier tokens; `position` tokens came before query 0 in all (X - T <= position). Sinks are the first
    tokens of k when X = T + position, otherwise they are given. sink n is seen through the band until it leaves it: by query t as a sink from
    position + t - n >= window on. scale None: K**-0.5. sink_logit_H: a learned logit that takes weight and has no value (softmax only).
    cu_seqlens needs X = T and position 0. `maximum` carries no gradient.
    normalise: the first result is the output itself, and the denominator carries no gradient either. Gradients of scores are then exactly 0 where a query
    sees one key (on cpu and torch; triton divides afterwards); of numerator / denominator they are what is left of two sums.
    """
    given = dict(q=(q_BTHK, "BTHK"), k=(k_BXGK, "BXGK"), v=(v_BXGV, "BXGV"))
    more = dict(
        log_forget_BXG=(log_forget_BXG, "BXG"), sink_k_BNGK=(sink_k_BNGK, "BNGK"), sink_v_BNGV=(sink_v_BNGV, "BNGV"), sink_logit_H=(sink_logit_H, "H"),
    )  # fmt: skip
    return _run(
        "banded", backend, given, more, {}, window=window, sinks=sinks, scale=scale, weight=weight, position=position, softcap=softcap,
        cu_seqlens=cu_seqlens, normalise=normalise,
    )  # fmt: skip


def window_linear(
    q_BTHK: Tensor,
    k_BXGK: Tensor,
    v_BXGV: Tensor,
    fq_BTHF: Tensor,
    fk_BXGF: Tensor,
    mix_BTH: Tensor,
    log_decay: Tensor | None = None,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    position: int = 0,
    sink_k_BNGK: Tensor | None = None,
    sink_v_BNGV: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    feature_map: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Window + sinks + linear attention of everything older, under one normaliser, in one pass (SEEDS A03 G02, 0.2).

    With near(t) the last `window` tokens and the sinks, older(t) every other token up to t - window, d_tj the product of exp(log_decay) over the steps
    after j left the window, up to t:

        o_t = (sum_near exp(s_tj) v_j + exp(mix_t) sum_older d_tj fq_t.fk_j v_j) / (the same sums without v)

    both branches relative to a common maximum. A token enters the state at the query at which it leaves the window; sinks never do. fq, fk are
    features >= 0, or what `feature_map` makes features of (fk for all X slots: window slots of earlier tokens included). log_decay: None, [B, T, G] or
    [B, T, G, F]. While nothing is older the result is the window's.
    Slots, position, sinks: as in `banded`; the first query drops slot x = -window, so a continued call gives at least min(position, window) slots.
    initial_state [N, G, F, V + 1] fp32: column V is the sum of features. Returns (o [B, T, H, V] in the dtype of v, final state or None).
    Differentiable in every tensor.
    """
    if cu_seqlens is None:
        tensors = q_BTHK, k_BXGK, v_BXGV, fq_BTHF, fk_BXGF, mix_BTH, log_decay, initial_state, sink_k_BNGK, sink_v_BNGV
        found = quick("window_linear", backend, tensors, (window, sinks, position, scale, output_final_state), feature_map)
        if found is not None:
            return found
    given = dict(
        q=(q_BTHK, "BTHK"), k=(k_BXGK, "BXGK"), v=(v_BXGV, "BXGV"), fq=(fq_BTHF, "BTHY"), fk=(fk_BXGF, "BXGY"), mix=(mix_BTH, "BTH"),
        log_decay=decay(log_decay, "BTGF"),
    )  # fmt: skip
    more = dict(sink_k_BNGK=(sink_k_BNGK, "BSGK"), sink_v_BNGV=(sink_v_BNGV, "BSGV"), initial_state=(initial_state, "NGFW"))
    sizes = dict(N=sequences(q_BTHK, cu_seqlens), W=v_BXGV.shape[-1] + 1, F=_features(fq_BTHF.shape[-1], feature_map))
    return _run(
        "window_linear", backend, given, more, sizes, window=window, sinks=sinks, scale=scale, position=position,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, feature_map=feature_map,
    )  # fmt: skip


def additive_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    state_BGKV: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of `additive`; `state` (fp32, contiguous) is updated in place. log_decay [B, G] or [B, G, K]. Returns o [B, H, V] fp32. No gradient."""
    o = quick("additive_step", backend, q_BHK, k_BGK, v_BGV, None, state_BGKV, log_decay, scale)
    if o is not None:
        return o
    given = dict(q=(q_BHK, "BHK"), k=(k_BGK, "BGK"), v=(v_BGV, "BGV"), state=(state_BGKV, "BGKV"), log_decay=decay(log_decay, "BGK"))
    return _run("additive_step", backend, given, {}, {}, scale=scale)


def delta_step(
    q_BHK: Tensor,
    k_BGK: Tensor,
    v_BGV: Tensor,
    beta_BG: Tensor,
    state_BGKV: Tensor,
    log_decay_BG: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One token of `delta`; as `additive_step`."""
    o = quick("delta_step", backend, q_BHK, k_BGK, v_BGV, beta_BG, state_BGKV, log_decay_BG, scale)
    if o is not None:
        return o
    given = dict(
        q=(q_BHK, "BHK"), k=(k_BGK, "BGK"), v=(v_BGV, "BGV"), beta=(beta_BG, "BG"), state=(state_BGKV, "BGKV"), log_decay=(log_decay_BG, "BG"),
    )  # fmt: skip
    return _run("delta_step", backend, given, {}, {}, scale=scale)


def window_linear_step(
    q_BHK: Tensor,
    k_BWGK: Tensor,
    v_BWGV: Tensor,
    fq_BHF: Tensor | None = None,
    mix_BH: Tensor | None = None,
    state_BGFX: Tensor | None = None,
    left_fk_BGF: Tensor | None = None,
    left_v_BGV: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    sink_k_BNGK: Tensor | None = None,
    sink_v_BNGV: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `window_linear`. k, v: the window, the new token last; sinks: those that have left it.

    state [B, G, F, V + 1] (fp32, contiguous, updated in place): fades by log_decay, then takes left_fk, left_v, the token that leaves now (None:
    nothing leaves), then is read with fq and weight exp(mix). state None: sinks and window alone. Returns o [B, H, V] fp32. No gradient.
    """
    o = quick("window_linear_step", backend, q_BHK, k_BWGK, v_BWGV, fq_BHF, mix_BH, state_BGFX, left_fk_BGF, left_v_BGV, log_decay, scale,
              sink_k_BNGK, sink_v_BNGV)  # fmt: skip
    if o is not None:
        return o
    given = dict(
        q=(q_BHK, "BHK"), k=(k_BWGK, "BWGK"), v=(v_BWGV, "BWGV"), fq=(fq_BHF, "BHF"), mix=(mix_BH, "BH"), state=(state_BGFX, "BGFX"),
        left_fk=(left_fk_BGF, "BGF"), left_v=(left_v_BGV, "BGV"), log_decay=decay(log_decay, "BGF"),
    )  # fmt: skip
    more = dict(sink_k_BNGK=(sink_k_BNGK, "BNGK"), sink_v_BNGV=(sink_v_BNGV, "BNGV"))
    return _run("window_linear_step", backend, given, more, dict(X=v_BWGV.shape[-1] + 1), scale=scale)
