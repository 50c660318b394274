"""Op 1: causal linear attention with an additive write and no, scalar or vector decay.

    S_t = exp(g_t) * S_{t-1} + k_t v_t^T        S: [F, V] per key/value head, fp32
    o_t = S_t^T q_t                             no normaliser, no scale: append a 1 to v to get the sum normaliser as the last column

SEEDS 3.1 (one cell, augmentation trick), 3.2 K2. Chunkwise form after Yang et al. 2024 (gated linear attention, section 4).

Key: B batch, T tokens, G key/value heads, R query heads per key/value head, F features, V value size, N chunks, C chunk size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Vector decay multiplies keys by exp(-cumulative log decay). Chunks of 32 with the offset in the middle keep the exponent below 88 (fp32 limit)
# as long as one step decays by less than exp(-5), below any gate that mixers produce (log sigmoid / 16). Stronger ones are computed in fp64, whose
# exponents reach to 709: exact to exp(-40) a step, where they are clamped.
CHUNK_PLAIN = 64
CHUNK_VECTOR = 32
MIN_LOG_DECAY = -5.0
LOWEST = -40.0


def additive_definition(
    q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None
):
    """The equation above, one token at a time, in the dtype of q. Oracle for tests; O(T F V).

    log_decay: None, [B, T, G] or [B, T, G, F], natural log, <= 0. Returns (o [B, T, G, R, V], state [B, G, F, V]).
    """
    B, T, G, R, feat = q_BTGRF.shape
    state = q_BTGRF.new_zeros(B, G, feat, v_BTGV.shape[-1]) if initial_state is None else initial_state.to(q_BTGRF.dtype)
    out = []
    for t in range(T):
        if log_decay is not None:
            g = log_decay[:, t].to(state.dtype)
            state = state * (g[..., None, None] if g.dim() == 2 else g[..., None]).exp()
        state = state + k_BTGF[:, t, :, :, None] * v_BTGV[:, t, :, None, :]
        out.append(torch.einsum("bgrf,bgfv->bgrv", q_BTGRF[:, t], state))
    return torch.stack(out, 1), state


def wide(x: Tensor) -> Tensor:
    """fp64 where the device has it (Apple's does not)."""
    return x.float() if x.device.type == "mps" else x.double()


def _chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, G, ...] -> [B, G, N, C, ...], zero-padded to a multiple of C (key 0 and log decay 0 leave the state alone)."""
    pad = -x.shape[1] % C
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return x.unflatten(1, (-1, C)).movedim(3, 1)


def additive_chunk(q_BTGRF: Tensor, k_BTGF: Tensor, v_BTGV: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None):
    """Chunkwise form: same arguments and results as `additive_definition`, computed in fp32 with matrix products.

    One chunk reads the state left by the chunks before it and attends to its own keys under a causal mask.
    """
    B, T, G, R, feat = q_BTGRF.shape
    vector = log_decay is not None and log_decay.dim() == 4
    C = min(CHUNK_VECTOR if vector else CHUNK_PLAIN, max(T, 1))
    strong = vector and log_decay.device.type != "mps" and bool((log_decay < MIN_LOG_DECAY).any())
    dtype = torch.float64 if strong else torch.float32
    q = _chunks(q_BTGRF.to(dtype), C).transpose(3, 4)  # [B, G, N, R, C, F]
    k, v = _chunks(k_BTGF.to(dtype), C), _chunks(v_BTGV.to(dtype), C)  # [B, G, N, C, F | V]
    state = k.new_zeros(B, G, feat, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    mask = torch.ones(C, C, dtype=torch.bool, device=k.device).tril()

    if log_decay is None:
        weights = (q @ k.transpose(-1, -2).unsqueeze(3)).masked_fill(~mask, 0.0)
        sums = k.transpose(-1, -2) @ v  # [B, G, N, F, V]
        running = torch.cumsum(torch.cat([state.unsqueeze(2), sums], 2), 2)
        before, state = running[:, :, :-1], running[:, :, -1]
        out = weights @ v.unsqueeze(3) + q @ before.unsqueeze(3)
    else:
        # Scalar: differences of sums over a chunk of strong decays (64 x -20) lose their last digits in fp32.
        log = log_decay.to(dtype).clamp_min(LOWEST) if vector else wide(log_decay)
        log = _chunks(log, C)  # [B, G, N, C] or [B, G, N, C, F]
        c = log.cumsum(3)
        last = c[:, :, :, -1:]
        if vector:
            middle = c[:, :, :, C // 2 : C // 2 + 1]
            weights = (q * (c - middle).exp().unsqueeze(3)) @ (k * (middle - c).exp()).transpose(-1, -2).unsqueeze(3)
            weights = weights.masked_fill(~mask, 0.0)
            read, write, fade = c.exp().unsqueeze(3), (last - c).exp(), last.exp().transpose(-1, -2)
        else:
            decay = (c.unsqueeze(-1) - c.unsqueeze(-2)).to(dtype).masked_fill(~mask, float("-inf")).exp()  # [B, G, N, C, C]
            weights = (q @ k.transpose(-1, -2).unsqueeze(3)) * decay.unsqueeze(3)
            read, write, fade = (x.to(dtype).exp().unsqueeze(-1) for x in (c.unsqueeze(3), last - c, last))
        sums = (k * write).transpose(-1, -2) @ v
        before = []
        for n in range(sums.shape[2]):
            before.append(state)
            state = state * fade[:, :, n] + sums[:, :, n]
        out = weights @ v.unsqueeze(3) + (q * read) @ torch.stack(before, 2).unsqueeze(3)
    return out.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, :T].float(), state.float()
