"""Ops 3 and 5 on GPUs: `band` and, for the linear branch's gradients and for long single sequences, `scan`. Saved: inputs, output, one number a query.

Key: B batch, T queries, X slots, H query heads, G key/value heads, K key size, V value size, F features, N sequences, NS sinks.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from subquad.kernels.features import signs
from subquad.kernels.triton.additive import KEYS, NONE, OF_VALUES, SCALAR, VALUES, decay_gradient, feature_tile, group_sum, kind_of, scan
from subquad.kernels.triton.band import band_forward_kernel, band_key_kernel, band_query_kernel, band_sink_kernel
from subquad.kernels.triton.features import constants, feature_gradient, row_norms
from subquad.kernels.triton.launch import SEGMENT_TOKENS, Packing, Tiles, pad, precision_of, roomy

ACROSS = {NONE: NONE, SCALAR: SCALAR, KEYS: VALUES}  # the decay's axis when keys and values change places
LARGEST_EXPONENT = {torch.float16: 10.0}  # of a query's weight in the backward pass; others hold e^60


def band_tiles(K: int, V: int, wide: bool) -> Tiles:
    return Tiles(32 if wide or max(pad(K), pad(V)) > 64 else 64, pad(V), 4 if max(pad(K), pad(V)) <= 64 else 8, 1 if wide else 2)


def linear_tiles(V: int, F: int, decay: int, wide: bool, roomy: bool) -> Tiles:
    """The state F x BV lives in registers beside the window's tiles; see `scan_tiles`. Chunks of 64 read a window of 64 in two blocks
    and need states of 64 x 64 at most. With wgmma groups of 4 warps repeat the scores, so 8 would hold no less each.
    """
    large = roomy and not wide and decay != KEYS and max(pad(F), pad(V)) <= 64
    BT = 64 if large else (16 if decay == KEYS or wide or max(pad(F), pad(V)) > 64 else 32)
    tight = roomy and decay == KEYS if pad(F) <= 128 else decay == SCALAR and not roomy  # what the compilers' figures say (docs/kernels_triton.md)
    return Tiles(BT, min(pad(V), max(16, (4096 if tight else 8192) // pad(F))), 4 if BT >= 32 else 8, 1)


@dataclass(frozen=True)
class Band:
    """The band of one call: sizes, where its sinks are, how its tokens are packed."""

    window: int
    sinks: int
    scale: float
    position: int
    before: int  # slots before the first query
    inside: bool  # sinks are the first slots of k
    packing: Packing
    precision: str

    @property
    def skip(self) -> int:
        """The first slot that may enter the state: sinks never do."""
        return max(0, self.sinks - (self.position - self.before))

    def older(self, device) -> Tensor:
        """[1, T] bool: queries for which something has left the window and is no sink; before that the linear branch does not count."""
        t = torch.arange(self.packing.T, device=device)
        if self.packing.cu is not None:
            cu = self.packing.cu.long()
            t = t - cu[torch.searchsorted(cu, t, right=True) - 1]
        return (self.position + t - self.window >= self.sinks)[None]

    def sizes(self, q: Tensor, k: Tensor, v: Tensor) -> dict:
        H, K, G, V = q.shape[2], q.shape[3], k.shape[2], v.shape[3]
        return dict(H=H, R=H // G, K=K, V=V, BK=pad(K), VARLEN=self.packing.cu is not None, PRECISION=self.precision)

    def cu(self, other: Tensor) -> Tensor:
        return other if self.packing.cu is None else self.packing.cu


def band_of(q, k, window, sinks, scale, position, sink_k, cu, precision) -> Band:
    before = k.shape[1] - q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Band(window, sinks, scale, position, before, sink_k is None, Packing.of(q, cu), precision_of(precision))


def forward(q, k, v, sink_k, sink_v, band: Band, *, out, total, top, logit=None, linear=None) -> None:
    """Launch `band_forward_kernel`. linear: (fq, fk, mix, log_decay, initial, final, feature map) or None."""
    packing, (K, V), G = band.packing, (q.shape[-1], v.shape[-1]), k.shape[2]
    sk, sv = (k, v) if sink_k is None else (sink_k, sink_v)
    wide = v.element_size() == 4
    sizes = band.sizes(q, k, v) | dict(NS=band.sinks, BN=pad(band.sinks), LOGIT=logit is not None, LINEAR=linear is not None)
    fq, fk, mix, g, initial, final, feature_map = linear if linear is not None else (None,) * 7
    kind, F, BF = kind_of(g), 1 if fq is None else fq.shape[-1] * signs(feature_map), 16 if fq is None else feature_tile(fq.shape[-1], feature_map)
    tiles = band_tiles(K, V, wide) if linear is None else linear_tiles(V, BF, kind, wide, roomy())
    segmented = linear is not None and packing.segmented(packing.N * sizes["H"] * triton.cdiv(V, tiles.BV))
    # Chunks of a program: one, a segment, or any number there is.
    SEG = 1 if linear is None else (SEGMENT_TOKENS if segmented else 2**30) // tiles.BT
    hs = None
    if segmented:
        hs = q.new_empty(packing.slots(SEGMENT_TOKENS), G, V + 1, F, dtype=torch.float32)
        scan_states(v, fk, g, band, initial, final, hs, feature_map)
    given = (fq, fk, mix, g, logit, total, initial, final, hs)
    fq, fk, mix, g, logit, total, h0, ht, hs = (q if x is None else x for x in given)
    # A kept block of 64 slots does not fit into registers beside the state.
    keep = linear is not None and max(pad(K), pad(V), BF) <= 64 and tiles.BT < 64
    band_forward_kernel[(triton.cdiv(V, tiles.BV), triton.cdiv(packing.T, SEG * tiles.BT), packing.N * sizes["H"])](
        q, k, v, fq, fk, mix, g, sk, sv, logit, out, total, top, h0, ht, hs, band.cu(q),
        band.scale, packing.T, k.shape[1], sk.shape[1], band.before, band.position, band.window, band.skip, 0,
        F=F, BT=tiles.BT, BV=tiles.BV, BF=BF, SEG=SEG, PHI=feature_map is not None, **constants(feature_map), LEVELS=tiles.BT.bit_length() - 1, DECAY=kind,
        KEEP=keep, SEGMENTED=segmented, USE_H0=initial is not None, STORE_HT=final is not None and not segmented, **sizes, **tiles.options,
    )  # fmt: skip


def scan_states(v, fk, g, band: Band, initial, final, hs, feature_map) -> None:
    """The linear branch's states at every SEGMENT_TOKENS tokens, [V + 1, F] each, and the final one."""
    G, F, V = fk.shape[2], fk.shape[-1] * signs(feature_map), v.shape[-1]
    shift = band.window - band.before
    scan(v, v, fk, heads=G, out=v, packing=band.packing, log_decay=g, decay=ACROSS[kind_of(g)], extra=None, extra_side=1, states=hs,
         initial=None if initial is None else (initial, G), initial_strides=(F * (V + 1), 1, V + 1), final=final, shift_k=shift, skip_k=band.skip,
         precision=band.precision, feature_map=feature_map, of=OF_VALUES, norms=row_norms(fk, feature_map))  # fmt: skip


def backward(q, k, v, sink_k, sink_v, band: Band, do, e, top):
    """(dq, dk, dv, dsink_k, dsink_v) of the window and the sinks; dk, dv per query head. do in the dtype of v, e and top fp32."""
    packing, (B, T, H, K), (X, G, V) = band.packing, q.shape, v.shape[1:]
    tiles = band_tiles(K, V, v.element_size() == 4)
    sizes = band.sizes(q, k, v) | dict(BT=tiles.BT, BV=pad(V))
    sk, sv = (k, v) if sink_k is None else (sink_k, sink_v)
    TS, cu, BN = sk.shape[1], band.cu(q), pad(band.sinks)
    place = (packing.T, X)
    dq = torch.empty_like(q)
    band_query_kernel[(triton.cdiv(T, tiles.BT), packing.N * H)](
        q, k, v, sk, sv, do, e, top, dq, cu, band.scale, *place, TS, band.before, band.position, band.window, NS=band.sinks, BN=BN, **sizes,
        **tiles.options,
    )  # fmt: skip
    part = torch.float32 if H != G or band.sinks else v.dtype
    dk, dv = (q.new_empty(B, X, H, size, dtype=part) for size in (K, V))
    band_key_kernel[(triton.cdiv(X, tiles.BT), packing.N * H)](
        q, k, v, do, e, top, dk, dv, cu, band.scale, *place, band.before, band.window, **sizes, **tiles.options
    )
    if not band.sinks:
        return dq, dk, dv, None, None
    SEG = 1024 // tiles.BT
    parts = [q.new_zeros(packing.slots(1024), H, band.sinks, size, dtype=torch.float32) for size in (K, V)]
    owner = torch.zeros(parts[0].shape[0], dtype=torch.int64, device=q.device)
    band_sink_kernel[(triton.cdiv(T, 1024), packing.N * H)](
        q, sk, sv, do, e, top, *parts, owner, cu, band.scale, packing.T, TS, band.position, band.window, NS=band.sinks, BN=BN, SEG=SEG, **sizes,
        **tiles.options,
    )  # fmt: skip
    sums = [x.new_zeros(packing.N, *x.shape[1:]).index_add_(0, owner, x).transpose(1, 2) for x in parts]  # [N, NS, H, K | V]
    if not band.inside:
        return dq, dk, dv, *(group_sum(x, G, torch.float32) for x in sums)
    for whole, part in zip((dk, dv), sums, strict=True):
        add_at_starts(whole, part, packing)
    return dq, dk, dv, None, None


def add_at_starts(x_BXHD: Tensor, part_NSHD: Tensor, packing: Packing) -> None:
    """x += part at the first rows of every sequence, as far as it has them."""
    if packing.cu is None:
        rows = min(part_NSHD.shape[1], x_BXHD.shape[1])
        x_BXHD[:, :rows] += part_NSHD[:, :rows]
        return
    row = packing.cu[:-1, None].long() + torch.arange(part_NSHD.shape[1], device=x_BXHD.device)
    exists = (row < packing.cu[1:, None]).flatten()
    part = part_NSHD.flatten(0, 1) * exists[:, None, None]
    x_BXHD[0].index_add_(0, row.flatten().clamp_max(x_BXHD.shape[1] - 1), part)


class Banded(torch.autograd.Function):
    """(q, k, v, sink_k, sink_v, sink_logit, window, sinks, scale, position, cu_seqlens, precision) -> (numerator, denominator, maximum)."""

    @staticmethod
    def forward(ctx, q, k, v, sink_k, sink_v, logit, window, sinks, scale, position, cu, precision):
        band = band_of(q, k, window, sinks, scale, position, sink_k, cu, precision)
        B, T, H = q.shape[:3]
        out = q.new_empty(B, T, H, v.shape[-1], dtype=torch.float32)
        total, top = (q.new_empty(B, T, H, dtype=torch.float32) for _ in range(2))
        forward(q, k, v, sink_k, sink_v, band, out=out, total=total, top=top, logit=logit)
        ctx.save_for_backward(q, k, v, sink_k, sink_v, logit, top, cu)
        ctx.band = band
        ctx.mark_non_differentiable(top)
        return out, total, top

    @staticmethod
    def backward(ctx, dout, dtotal, _):
        q, k, v, sink_k, sink_v, logit, top, _ = ctx.saved_tensors
        dtotal = dtotal.float().contiguous()
        dq, dk, dv, dsk, dsv = backward(q, k, v, sink_k, sink_v, ctx.band, dout.to(v.dtype).contiguous(), dtotal, top)
        G = k.shape[2]
        dlogit = None if logit is None else (dtotal * (logit.float() - top).exp()).sum((0, 1)).to(logit.dtype)
        dsk, dsv = (None if x is None else x.to(k.dtype) for x in (dsk, dsv))
        return dq, group_sum(dk, G, k.dtype), group_sum(dv, G, v.dtype), dsk, dsv, dlogit, None, None, None, None, None, None


class WindowLinear(torch.autograd.Function):
    """(q, k, v, fq, fk, mix, log_decay, initial, sink_k, sink_v, window, sinks, scale, position, final?, cu_seqlens, precision, feature_map)
    -> (o, final state)."""

    @staticmethod
    def forward(ctx, q, k, v, fq, fk, mix, g, initial, sink_k, sink_v, window, sinks, scale, position, final_wanted, cu, precision, feature_map):
        band = band_of(q, k, window, sinks, scale, position, sink_k, cu, precision)
        (B, T, H), (G, V), F = q.shape[:3], v.shape[2:], fq.shape[-1] * signs(feature_map)
        out = q.new_empty(B, T, H, V, dtype=v.dtype)
        top = q.new_empty(B, T, H, dtype=torch.float32)
        final = None
        if final_wanted:  # a sequence without tokens has no program that writes its state: it stays what it was
            final = q.new_zeros(band.packing.N, G, F, V + 1, dtype=torch.float32) if initial is None else initial.float().clone()
        forward(q, k, v, sink_k, sink_v, band, out=out, total=None, top=top, linear=(fq, fk, mix, g, initial, final, feature_map))
        ctx.save_for_backward(q, k, v, fq, fk, mix, g, initial, sink_k, sink_v, out, top, final if g is not None else None, cu)
        ctx.band, ctx.feature_map = band, feature_map
        return out, final

    @staticmethod
    def backward(ctx, dout, dfinal):
        q, k, v, fq, fk, mix, g, initial, sink_k, sink_v, out, top, final, _ = ctx.saved_tensors
        band, G, feature_map = ctx.band, k.shape[2], ctx.feature_map
        dout = dout.to(v.dtype).contiguous()
        e = -(dout.float() * out.float()).sum(-1)
        dq, dk, dv, dsk, dsv = backward(q, k, v, sink_k, sink_v, band, dout, e, top)
        weight = (mix.float() - top).clamp_max(LARGEST_EXPONENT.get(v.dtype, 60.0)).exp() * band.older(q.device)[..., None]
        linear = Linear(fq, fk, v, weight, band, feature_map)
        dfq, dfk, dv_linear, dinitial = linear.backward(g, initial, dout, e, dfinal)
        dfk = group_sum(dfk, G, torch.float32)
        dg = None
        if g is not None:
            carry = None
            if dfinal is not None:
                carry = (final * dfinal).sum(-1).sum(-1) if g.dim() == 3 else (final * dfinal).sum(-1)
            dg = linear.decay_gradient(dfq, dfk, carry, g, initial is not None)
        dfq, dfk, dmix = linear.inputs(dfq, dfk)
        dsk, dsv = (None if x is None else x.to(k.dtype) for x in (dsk, dsv))
        dv = group_sum(dv.float() + dv_linear.float(), G, v.dtype)
        return dq, group_sum(dk, G, k.dtype), dv, dfq, dfk, dmix.to(mix.dtype), dg, dinitial, dsk, dsv, *(None,) * 8


class Linear:
    """The linear branch backward. Queries count with a weight each; a feature map is applied inside the scans, features as they are are weighted here."""

    def __init__(self, fq, fk, v, weight_BTH, band: Band, feature_map: str | None):
        self.fq, self.fk, self.v, self.weight, self.band, self.feature_map = fq, fk, v, weight_BTH, band, feature_map
        if feature_map is None:
            self.query, self.key, self.scales = (fq.float() * weight_BTH.unsqueeze(-1)).to(v.dtype), fk.to(v.dtype), None
        else:
            self.query, self.key, self.scales = fq, fk, weight_BTH.contiguous()
        self.norms = row_norms(fq, feature_map), row_norms(fk, feature_map)

    def backward(self, g, initial, do, e, dfinal):
        """Gradients of the weighted queries' features, of the keys' and of v (per query head, fp32) and of the initial state."""
        query, key, v, band = self.query, self.key, self.v, self.band
        (B, T, H), (X, G, V), F = query.shape[:3], v.shape[1:], query.shape[-1] * signs(self.feature_map)
        kind, shift, skip = kind_of(g), band.window - band.before, band.skip
        dfinal = None if dfinal is None else dfinal.contiguous()
        start, end = (None if x is None else (x, G) for x in (initial, dfinal))
        turned, straight = (F * (V + 1), 1, V + 1), (F * (V + 1), V + 1, 1)
        dquery = query.new_empty(B, T, H, F, dtype=torch.float32)
        dfk, dv = (query.new_zeros(B, X, H, size, dtype=torch.float32) for size in (F, V))  # slots that never leave the window stay zero
        dinitial = None if initial is None else query.new_empty(band.packing.N, H, F, V + 1, dtype=torch.float32)
        common = dict(heads=H, packing=band.packing, log_decay=g, precision=band.precision, feature_map=self.feature_map)
        exchanged = dict(decay=ACROSS[kind], extra=e, initial_strides=turned, of=OF_VALUES, **common)
        late, early = dict(shift_k=shift, skip_k=skip), dict(shift_q=shift, skip_q=skip, reverse=True, weight=self.scales)
        scan(do, v, key, out=dquery, extra_side=1, initial=start, norms=self.norms[1], **late, **exchanged)
        scan(v, do, query, out=dfk, extra_side=2, initial=end, final=dinitial, norms=self.norms[0], **early, **exchanged)
        scan(key, query, do, out=dv, decay=kind, initial=end, initial_strides=straight, **early, **common)
        return dquery, dfk, dv, None if dinitial is None else dinitial.unflatten(1, (G, -1)).sum(2)

    def decay_gradient(self, dquery, dfk, carry, g, started: bool):
        band = self.band
        return decay_gradient(self.query, dquery, self.fk, dfk, carry, g, band.packing, started, band.window - band.before, band.skip,
                              self.feature_map, self.norms, self.scales)  # fmt: skip

    def inputs(self, dquery, dfk):
        """From gradients of weighted features to those of fq, of fk and of mix."""
        if self.feature_map is None:
            dmix = (self.query.float() * dquery).sum(-1)
            return (dquery * self.weight.unsqueeze(-1)).to(self.fq.dtype), dfk.to(self.fk.dtype), dmix
        dfq, dmix = feature_gradient(self.fq, dquery, self.feature_map, self.scales)
        return dfq, feature_gradient(self.fk, dfk, self.feature_map)[0], dmix
