"""The cell beside transformers' own torch functions on the same random numbers: outputs and final state.

Where conventions differ, the test says how one is turned into the other:
  gated delta (qwen3_next): log decays g; queries and keys are made unit length inside, queries times 1 / sqrt(K); state [B, H, K, V].
  lightning (minimax): the state fades by e^-slope per token; the own token is not faded, the same as here; state [B, H, K, V].
  Mamba-2 (mamba2): x is the value, B the key, C the query, dt times x is written and exp(dt A) fades; a skip D x is added; state [B, H, V, K].

Key: B batch, T tokens, H heads, K key size, V value size.
"""

import torch
from tolerances import MIXER, assert_near
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan, mamba2_selective_state_update
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

from subquad.kernels.additive import additive_chunk
from subquad.kernels.delta import delta_chunk
from subquad.linearize.mixers.feature_maps import unit

B, T, H, K, V = 2, 150, 3, 16, 8


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def test_gated_delta_is_qwen3_nexts():
    q, k, v, beta, g = randn(B, T, H, K), randn(B, T, H, K) + 0.1, randn(B, T, H, V), torch.sigmoid(randn(B, T, H)), -randn(B, T, H).abs()
    start = randn(B, H, K, V)
    own, state = delta_chunk(unit(q).unsqueeze(3) * K**-0.5, unit(k), v, beta, g, start)
    for function in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        out, last = function(q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True)
        assert_near(own.squeeze(3), out, MIXER, function.__name__)
        assert_near(state, last, MIXER, function.__name__)


def test_lightning_is_minimaxs():
    """Minimax's attention runs on SiLU of the projected q, k, v; its slopes are its own (`get_slope_rate`)."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    config = MiniMaxConfig(hidden_size=H * K, num_attention_heads=H, num_key_value_heads=H, head_dim=K, num_hidden_layers=2, block_size=32)
    torch.manual_seed(0)
    layer = MiniMaxLightningAttention(config, layer_idx=0).eval()
    seen = {}
    layer.norm.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    x = randn(B, T, H * K)
    cache = MiniMaxCache()
    with torch.no_grad():
        layer(x, position_embeddings=None, attention_mask=None, past_key_values=cache)
        q, k, v = layer.act_fn(layer.qkv_proj(x)).view(B, T, H, 3 * K).split(K, -1)
        decay = -layer.slope_rate.flatten().expand(B, T, H)
        out, state = additive_chunk(q.unsqueeze(3), k, v, decay)
    assert_near(out.flatten(2), seen["out"], MIXER)
    assert_near(state, cache.get_linear_cache(0), MIXER)


def test_scalar_decay_is_mamba2s():
    x, key, query = randn(B, T, H, V), randn(B, T, 1, K), randn(B, T, 1, K) + 0.1
    raw, A, D, bias = randn(B, T, H), -randn(H).exp(), randn(H), randn(H)
    start = randn(B, H, V, K)
    out, last = mamba2_chunk_scan(
        x, raw, A, key, query, chunk_size=32, D=D, dt_bias=bias, initial_states=start, dt_softplus=True, return_final_states=True
    )  # fmt: skip
    dt = torch.nn.functional.softplus(raw + bias)
    k, q = key.expand(B, T, H, K) * dt.unsqueeze(-1), query.expand(B, T, H, K).unsqueeze(3)
    own, state = additive_chunk(q, k, x, dt * A, start.transpose(-1, -2))
    assert_near(own.squeeze(3) + D[:, None] * x, out, MIXER)
    assert_near(state.transpose(-1, -2), last, MIXER)
    wide = [x[:, 0], dt[:, 0, :, None].expand(B, H, V), A[:, None, None].expand(H, V, K), key[:, 0], query[:, 0], D[:, None].expand(H, V)]
    assert_near(mamba2_selective_state_update(start.clone(), *wide), out[:, 0], MIXER, "one step")
