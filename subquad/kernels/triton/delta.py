"""Op 2 on GPUs: `wy` launched forward and backward. Saved: the inputs; the chunks' inverses and states are computed again.

Key: B batch, T tokens, H query heads, G key/value heads, K key size, V value size, N sequences.
"""

import torch
import triton

from subquad.kernels.triton.additive import group_sum
from subquad.kernels.triton.launch import Packing, Tiles, pad, precision_of, roomy
from subquad.kernels.triton.wy import delta_back_kernel, delta_gradient_kernel, delta_kernel, invert_kernel


def chunk_size(wide: bool) -> int:
    """Tokens of a chunk; the inverse is BT x BT a chunk and head."""
    return 16 if wide else 32


def walk_tiles(K: int, V: int, wide: bool, roomy: bool) -> Tiles:
    """The state K x BV lives in registers; see `scan_tiles`."""
    BV = min(pad(V), max(16, (8192 if roomy and not wide else 4096) // pad(K)))
    return Tiles(chunk_size(wide), BV, 8 if pad(K) > 64 else 4, 1 if wide else 2)


def gradient_tiles(K: int, V: int, wide: bool) -> Tiles:
    return Tiles(chunk_size(wide), 16 if pad(K) > 64 else 32, 8 if pad(K) > 64 else 4, 1)


class Delta(torch.autograd.Function):
    """(q, k, v, beta, log_decay, initial_state, scale, output_final_state, cu_seqlens, out_dtype, precision) -> (o, final state)."""

    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, initial, scale, final_wanted, cu, out_dtype, precision):
        packing, (B, T, H, K), (G, V) = Packing.of(q, cu), q.shape, v.shape[2:]
        precision = precision_of(precision)
        x = inverses(k, beta, log_decay, packing, precision)
        out = q.new_empty(B, T, H, V, dtype=out_dtype or v.dtype)
        final = q.new_empty(packing.N, G, K, V, dtype=torch.float32) if final_wanted else None
        walk(q, k, v, beta, log_decay, x, packing, precision, heads=H, scale=scale, out=out, initial=initial, final=final)
        ctx.save_for_backward(q, k, v, beta, log_decay, initial, cu)
        ctx.scale, ctx.precision = scale, precision
        return out, final

    @staticmethod
    def backward(ctx, dout, dfinal):
        q, k, v, beta, log_decay, initial, cu = ctx.saved_tensors
        packing, (B, T, H, K), (G, V) = Packing.of(q, cu), q.shape, v.shape[2:]
        dout = (dout * ctx.scale).to(v.dtype).contiguous()
        x = inverses(k, beta, log_decay, packing, ctx.precision)
        wide = v.element_size() == 4
        BT = chunk_size(wide)
        states = k.new_empty(packing.slots(BT), G, K, V)
        walk(q, k, v, beta, log_decay, x, packing, ctx.precision, heads=G, initial=initial, states=states)
        slopes = k.new_empty(packing.slots(BT), H, K, V)
        dinitial = None if initial is None else q.new_empty(packing.N, H, K, V, dtype=torch.float32)
        tiles = walk_tiles(K, V, wide, roomy())
        g, pack = q if log_decay is None else log_decay, q if cu is None else cu
        common = dict(
            T=T, H=H, R=H // G, K=K, V=V, BT=BT, BK=pad(K), GATED=log_decay is not None, VARLEN=cu is not None, PRECISION=ctx.precision
        )
        dfinal = None if dfinal is None else dfinal.contiguous()
        delta_back_kernel[(triton.cdiv(V, tiles.BV), packing.N * H)](
            q, k, dout, beta, g, x, q if dfinal is None else dfinal, q if dinitial is None else dinitial, slopes, pack,
            BV=tiles.BV, USE_DHT=dfinal is not None, STORE_DH0=initial is not None, **common, **tiles.options,
        )  # fmt: skip
        part = torch.float32 if H != G else None
        dq = torch.empty_like(q)
        dk, dv = q.new_empty(B, T, H, K, dtype=part or k.dtype), q.new_empty(B, T, H, V, dtype=part or v.dtype)
        dbeta, dg = (q.new_empty(B, T, H, dtype=torch.float32) for _ in range(2))
        tiles = gradient_tiles(K, V, wide)
        delta_gradient_kernel[(triton.cdiv(T, BT), packing.N * H)](
            q, k, v, dout, beta, g, x, states, slopes, dq, dk, dv, dbeta, dg, pack, BV=tiles.BV, **common, **tiles.options
        )
        dk, dv, dbeta = (group_sum(part, G, like.dtype) for part, like in ((dk, k), (dv, v), (dbeta, beta)))
        dg = None if log_decay is None else group_sum(dg, G, torch.float32)
        dinitial = None if dinitial is None else dinitial.unflatten(1, (G, -1)).sum(2)
        return dq, dk, dv, dbeta, dg, dinitial, None, None, None, None, None


def inverses(k, beta, log_decay, packing: Packing, precision: str):
    """X of every chunk, [B, T, G, BT] in the dtype of k; solved in fp32 whatever the inputs."""
    B, T, G, K = k.shape
    BT = chunk_size(k.element_size() == 4)
    x = k.new_empty(B, T, G, BT)
    invert_kernel[(triton.cdiv(T, BT), packing.N * G)](
        k, beta, k if log_decay is None else log_decay, x, k if packing.cu is None else packing.cu, T,
        G=G, K=K, BT=BT, BK=pad(K), LEVELS=BT.bit_length() - 1, GATED=log_decay is not None, VARLEN=packing.cu is not None,
        PRECISION=precision, SOLVE=precision_of(None), num_warps=4, num_stages=1,
    )  # fmt: skip
    return x


def walk(q, k, v, beta, log_decay, x, packing, precision, *, heads, scale=1.0, out=None, initial=None, final=None, states=None) -> None:
    """`delta_kernel`: outputs, or the states before every chunk (heads = key/value heads)."""
    (T, G, K), V = k.shape[1:], v.shape[-1]
    tiles = walk_tiles(K, V, v.element_size() == 4, roomy())
    given = (log_decay, x, out, initial, final, states, packing.cu)
    g, x, o, h0, ht, hs, cu = (q if tensor is None else tensor for tensor in given)
    delta_kernel[(triton.cdiv(V, tiles.BV), packing.N * heads)](
        q, k, v, beta, g, x, o, h0, ht, hs, cu, scale, T, H=heads, R=heads // G, K=K, V=V, BT=tiles.BT, BK=pad(K), BV=tiles.BV,
        GATED=log_decay is not None, OUTPUT=out is not None, STATES=states is not None, VARLEN=packing.cu is not None,
        USE_H0=initial is not None, STORE_HT=final is not None, PRECISION=precision, **tiles.options,
    )  # fmt: skip
