"""Op 1 on GPUs: `scan_kernel` launched forward and, with its roles exchanged, three times backward. Nothing but the inputs is saved.

Key: B batch, T tokens, H query heads, G key/value heads, R = H / G, K features, V columns, N sequences.
"""

import torch
import triton
from torch import Tensor

from subquad.kernels.features import signs
from subquad.kernels.triton.features import constants, feature_gradient, row_norms
from subquad.kernels.triton.launch import SEGMENT_TOKENS, Packing, Tiles, cuda_arch, pad, precision_of, roomy
from subquad.kernels.triton.scan import decay_gradient_kernel, scan_kernel

NONE, SCALAR, KEYS, VALUES = 0, 1, 2, 3
OF_KEYS, OF_VALUES = 1, 2  # what a feature map is applied to in a scan: q and k, or v


def feature_tile(Y: int, feature_map: str | None) -> int:
    """Smallest tile of a row's features: each sign is padded for itself."""
    return pad(Y) * signs(feature_map)


def scan_tiles(K: int, V: int, decay: int, wide: bool, extra: bool, roomy: bool) -> Tiles:
    """The state K x BV lives in registers, so their product is bounded: by 128 x 128 where matrix units read shared memory (`roomy`), by half of that
    where they read registers, and by half again where a normaliser joins in (`extra`). A decay per feature needs several scaled copies of a chunk, 4-byte inputs
    (`wide`) twice the space.
    """
    BK = pad(K)
    if decay >= KEYS:
        return Tiles(16, min(pad(V), 32 if decay == VALUES else key_decay_columns(K, roomy)), 4 if BK <= 64 else 8, 1)
    if wide:
        return Tiles(16, min(pad(V), max(16, 4096 // BK)), 4, 1)
    BV = min(pad(V), max(16, (16384 if roomy else 8192) // (2 if extra else 1) // BK))
    if BK > 128:  # 440 bytes of spills with chunks of 32
        return Tiles(16, BV, 8, 1)
    return Tiles(32, BV, 8 if BK * BV > 4096 else 4, 2)


def key_decay_columns(K: int, roomy: bool) -> int:
    """BV of a state K x BV with a decay per key feature; 128 x 64 spills a few registers on compute capability 9.0 and none on 8.0, 256 x 32 on 8.0."""
    return max(16, (4096 if roomy or pad(K) > 128 else 8192) // pad(K))


def launch_options(tiles: Tiles, mode: int) -> dict[str, int]:
    """On compute capability 10 triton 3.9 cannot pipeline a loop that stores the sums a matrix unit is adding to (its own check of the loop fails)."""
    return tiles.options | ({"num_stages": 1} if mode == 1 and 100 <= cuda_arch() < 120 else {})


def scan(
    q, k, v, *, heads, out, packing: Packing, log_decay=None, decay=NONE, extra=None, extra_side=0, reverse=False, scale=1.0,
    initial=None, initial_strides=None, final=None, shift_q=0, shift_k=0, skip_q=0, skip_k=0, precision=None, states=None,
    feature_map=None, of=OF_KEYS, norms=None, weight=None,
):  # fmt: skip
    """One scan (see scan.py). q, k, v [.., rows, heads or fewer, K | V]; out [.., rows of q, heads, V] is written where rows exist.

    initial: (tensor, heads it has); final: a tensor for `heads` heads; initial_strides: (head, k, v) of both. states: only leave the states there.
    feature_map: of q and k or of v (`of`), with norms of v's rows and, for k's or v's, a weight.
    """
    phi = 0 if feature_map is None else of
    K, V = q.shape[-1] * (signs(feature_map) if phi == OF_KEYS else 1), v.shape[-1] * (signs(feature_map) if phi == OF_VALUES else 1)
    BK = feature_tile(q.shape[-1], feature_map if phi == OF_KEYS else None)
    tiles = scan_tiles(BK, V, decay, (k if phi == OF_VALUES else v).element_size() == 4, extra_side > 0, roomy())
    seg, blocks = SEGMENT_TOKENS // tiles.BT, triton.cdiv(V, tiles.BV)
    h0, h0_heads = initial if initial is not None else (q, heads)
    strides = initial_strides or (K * V, V, 1)
    common = dict(
        scale=scale, T=packing.T, TQ=q.shape[1], TK=k.shape[1], shift_q=shift_q, shift_k=shift_k, skip_q=skip_q, skip_k=skip_k,
        stride_head=strides[0], stride_k=strides[1], stride_v=strides[2], zero=0, H=heads, RQ=heads // q.shape[2], RK=heads // k.shape[2],
        RG=1 if log_decay is None else heads // log_decay.shape[2], RS=heads // h0_heads, K=K, V=V, BT=tiles.BT, BK=BK, BV=tiles.BV, SEG=seg,
        LEVELS=tiles.BT.bit_length() - 1, DECAY=decay, EXTRA=extra_side, REVERSE=reverse, VARLEN=packing.cu is not None,
        PRECISION=precision_of(precision), PHI=phi, WEIGHT=weight is not None, **constants(feature_map),
    )  # fmt: skip
    g, x, cu, n, w = (q if given is None else given for given in (log_decay, extra, packing.cu, norms, weight))
    ht = q if final is None else final

    def launch(mode: int, segments: int, hs: Tensor) -> None:
        scan_kernel[(blocks, segments, packing.N * heads)](
            q, k, v, g, x, out, h0, ht, hs, cu, n, w, MODE=mode, USE_H0=initial is not None, STORE_HT=final is not None and mode < 2, **common,
            **launch_options(tiles, mode),
        )  # fmt: skip

    if states is not None:
        return launch(1, 1, states)
    if not packing.segmented(packing.N * heads * blocks):
        return launch(0, 1, q)
    rows = K + (extra_side > 0)
    hs = q.new_empty(packing.slots(SEGMENT_TOKENS), heads, rows, V, dtype=torch.float32)
    launch(1, 1, hs)
    launch(2, triton.cdiv(packing.T, SEGMENT_TOKENS), hs)


def decay_gradient(
    q, dq, k, dk, carry, log_decay, packing: Packing, started: bool, shift_k: int = 0, skip_k: int = 0, feature_map=None, norms=(None, None), weight=None
) -> Tensor:
    """Gradient of the log decay from those of q and k (fp32, dk summed over query heads); carry: final state times its gradient, or None.

    started: there was an initial state. feature_map: dq and dk are those of the features of q and k, with norms of both; weight: of q's.
    """
    G, R, K = k.shape[2], q.shape[2] // k.shape[2], dq.shape[-1]
    scalar = log_decay.dim() == 3
    BK = pad(K) if scalar else min(pad(K), 64)
    out = torch.empty_like(log_decay, dtype=torch.float32)
    decay_gradient_kernel[(triton.cdiv(K, BK), packing.N * G)](
        q, dq, k, dk, *(q if x is None else x for x in (carry, out, packing.cu, *norms, weight)), packing.T, k.shape[1], shift_k, skip_k,
        PHI=feature_map is not None, WEIGHT=weight is not None, **constants(feature_map), G=G, R=R, K=K, BT=32, BK=BK,
        SCALAR=scalar, USE_H0=started, USE_CARRY=carry is not None, VARLEN=packing.cu is not None, num_warps=4,
    )  # fmt: skip
    return out


def group_sum(x_BTHD: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """Gradients per query head -> per key/value head."""
    return x_BTHD.to(dtype) if x_BTHD.shape[2] == G else x_BTHD.unflatten(2, (G, -1)).sum(3, dtype=torch.float32).to(dtype)


def kind_of(log_decay: Tensor | None) -> int:
    return NONE if log_decay is None else (SCALAR if log_decay.dim() == 3 else KEYS)


class Additive(torch.autograd.Function):
    """(q, k, v, log_decay, initial_state, scale, output_final_state, cu_seqlens, out_dtype, precision, feature_map) -> (o, final state)."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial, scale, final_wanted, cu, out_dtype, precision, feature_map):
        packing = Packing.of(q, cu)
        B, T, H = q.shape[:3]
        (G, V), K = v.shape[2:], q.shape[-1] * signs(feature_map)
        out = q.new_empty(B, T, H, V, dtype=out_dtype or v.dtype)
        final = q.new_empty(packing.N, G, K, V, dtype=torch.float32) if final_wanted else None
        start = None if initial is None else (initial, G)
        options = dict(packing=packing, log_decay=log_decay, decay=kind_of(log_decay), initial=start, precision=precision, feature_map=feature_map)
        if final_wanted and H != G:  # outputs are per query head, the state per key/value head
            states = q.new_empty(packing.slots(SEGMENT_TOKENS), G, K, V, dtype=torch.float32)
            scan(k, k, v, heads=G, out=v, states=states, final=final, **options)
            scan(q, k, v, heads=H, out=out, scale=scale, **options)
        else:
            scan(q, k, v, heads=H, out=out, scale=scale, final=final, **options)
        ctx.save_for_backward(q, k, v, log_decay, initial, final if log_decay is not None else None, cu)
        ctx.scale, ctx.precision, ctx.feature_map = scale, precision, feature_map
        return out, final

    @staticmethod
    def backward(ctx, dout, dfinal):
        q, k, v, log_decay, initial, final, cu = ctx.saved_tensors
        packing, kind, feature_map = Packing.of(q, cu), kind_of(log_decay), ctx.feature_map
        (B, T, H), (G, V), K = q.shape[:3], v.shape[2:], q.shape[-1] * signs(feature_map)
        dout = (dout * ctx.scale).to(v.dtype).contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        wide = torch.float32 if kind != NONE or H != G or feature_map is not None else None
        dq, dk = (q.new_empty(B, T, H, K, dtype=wide or x.dtype) for x in (q, k))
        dv = v.new_empty(B, T, H, V, dtype=torch.float32 if H != G else v.dtype)
        dinitial = None if initial is None else q.new_empty(packing.N, H, K, V, dtype=torch.float32)
        across = {NONE: NONE, SCALAR: SCALAR, KEYS: VALUES}[kind]
        options = dict(heads=H, packing=packing, log_decay=log_decay, precision=ctx.precision, feature_map=feature_map)
        turned = dict(decay=across, initial_strides=(K * V, 1, V), of=OF_VALUES)
        start, end = (None if x is None else (x, G) for x in (initial, dfinal))
        norms = row_norms(q, feature_map), row_norms(k, feature_map)
        scan(dout, v, k, out=dq, initial=start, norms=norms[1], **turned, **options)
        scan(v, dout, q, out=dk, initial=end, norms=norms[0], reverse=True, **turned, **options)
        scan(k, q, dout, out=dv, decay=kind, initial=end, final=dinitial, reverse=True, **options)
        dinitial = None if dinitial is None else dinitial.unflatten(1, (G, -1)).sum(2)
        dg, dk_sum = None, group_sum(dk, G, wide or k.dtype)
        if kind != NONE:
            carry = None
            if dfinal is not None:
                carry = (final * dfinal).sum(-1).sum(-1) if kind == SCALAR else (final * dfinal).sum(-1)
            dg = decay_gradient(q, dq, k, dk_sum, carry, log_decay, packing, initial is not None, feature_map=feature_map, norms=norms)
        if feature_map is not None:
            dq, dk_sum = feature_gradient(q, dq, feature_map)[0], feature_gradient(k, dk_sum, feature_map)[0]
        return dq.to(q.dtype), dk_sum.to(k.dtype), group_sum(dv, G, v.dtype), dg, dinitial, *(None,) * 6
