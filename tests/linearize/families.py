"""The families of the parity suite: transformers model type -> what its tiny config needs beyond helpers.SIZES.

A new row buys the whole suite of test_families.py; nothing in `subquad/` knows any of these names.
"""

from typing import Any

HEAD = {"head_dim": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}  # K 16, V 16
WIDE = {**LATENT, "v_head_dim": 24}  # V != K
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
SHARED = {"shared_expert_intermediate_size": 32}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
DROPS = {"dropout": 0.0, "attention_dropout": 0.0}
HYBRID = {"layer_types": ["full_attention", "linear_attention", "full_attention"]}

FULL3 = ["full_attention"] * 3
SLIDING1 = ["sliding_attention", "full_attention", "full_attention"]
GRANITE = {"attention_multiplier": 0.25}  # of q.k; without it 1, where real checkpoints have 1 / head size
NEMOTRON = {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "num_hidden_layers": 4}
KIMI = {"linear_head_dim": 16, "linear_num_heads": 4, "num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 32}
LONGCAT = {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 257, "sliding_window": 8}
GEMMA3N = {**PER_LAYER, "laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 3, "intermediate_size": [128] * 3}
DECODER = {
    "d_model": 64,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
    "is_decoder": True,
    "is_encoder_decoder": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # the list of DESIGN section 2
    "llama": {},
    "gpt2": GPT,
    "gpt_neox": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3_5_text": {**HEAD, **DELTA, "layer_types": ["full_attention"] * 3},
    "phi": {},
    "phi3": {},
    "gemma3_text": {**HEAD, "layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 8},
    "mistral": {"sliding_window": None},
    "ministral": {**HEAD, "layer_types": ["full_attention"] * 3},
    "mixtral": LOCAL,
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    "stablelm": {},
    "granite": GRANITE,
    "cohere": {},
    "smollm3": {},
    "nanochat": {},
    "gpt_bigcode": GPT,
    "bert": {"is_decoder": True},
    "gemma2": {**HEAD, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
    "gpt_oss": {**HEAD, **LOCAL, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8},
    # hybrids: the teacher's own recurrent layers stay
    "qwen3_next": {**HEAD, **MOE, **SHARED, **DELTA, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "granitemoehybrid": {**HYBRID, **MAMBA, **GRANITE, "num_local_experts": 4, "shared_intermediate_size": 64},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "bamba": {**MAMBA, "attn_layer_indices": [0, 2]},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "lfm2_moe": {**MOE, "layer_types": ["full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "minimax": {**LOCAL, **HYBRID},
    "nemotron_h": {**HEAD, **NEMOTRON, "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"]},
    "olmo_hybrid": {**HYBRID, **DELTA},
    "kimi_linear": {**LATENT, **KIMI, "q_lora_rank": None, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "zaya": {**HEAD, **MOE, "num_experts_per_tok": 1, "router_hidden_size": 32},
    # latent attention: keys and values of different size
    "deepseek_v2": {**WIDE, **ROUTED},
    "deepseek_v3": {**WIDE, **ROUTED},
    "youtu": WIDE,
    "minicpm3": WIDE,
    "glm4_moe_lite": {**WIDE, **ROUTED},
    "axk1": {**WIDE, **ROUTED, "n_shared_experts": 1},
    "longcat_flash": {**LATENT, "head_dim": 8, "num_layers": 2, "ffn_hidden_size": 128, **LONGCAT},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16, **ROUTED, "layer_types": FULL3},
    # the rest of transformers' causal models
    "gemma": HEAD,
    "gemma3n_text": {**HEAD, **GEMMA3N, "num_kv_shared_layers": 0, "layer_types": SLIDING1},
    "gemma4_text": {**HEAD, "layer_types": SLIDING1, **PER_LAYER, "per_layer_config": {}},
    "vaultgemma": {**HEAD, "layer_types": SLIDING1, "sliding_window": 8},
    "cohere2": {"layer_types": SLIDING1, "sliding_window": 8},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": {**HEAD, **ROUTED},
    "olmo": {},
    "olmo3": {"layer_types": SLIDING1, "sliding_window": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "exaone4": {"layer_types": FULL3, "sliding_window": None},
    "exaone_moe": {**HEAD, **MOE, "layer_types": SLIDING1, "sliding_window": 8},
    "nemotron": {},
    "helium": HEAD,
    "seed_oss": HEAD,
    "arcee": {},
    "apertus": {},
    "ernie4_5": HEAD,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "qwen2_moe": {**MOE, **SHARED},
    "qwen3_moe": {**HEAD, **MOE},
    "qwen3_5_moe_text": {**HEAD, **MOE, **SHARED, **DELTA, "layer_types": FULL3},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": {**HEAD, "num_experts": 4, "moe_topk": 2},
    "dots1": {**HEAD, **ROUTED, "n_shared_experts": 1, "layer_types": FULL3},
    "phimoe": LOCAL,
    "granitemoe": {**LOCAL, **GRANITE},
    "granitemoeshared": {**LOCAL, **GRANITE},
    "llama4_text": {**HEAD, **LOCAL, "intermediate_size_mlp": 128, "layer_types": FULL3, "no_rope_layers": [1, 1, 1]},
    "minimax_m2": {**HEAD, **LOCAL},
    "solar_open": {**HEAD, **ROUTED},
    "mellum": {**HEAD, **LOCAL, "moe_intermediate_size": 32, "layer_types": SLIDING1, "sliding_window": 8},
    "laguna": {**HEAD, **MOE, **SHARED, "num_attention_heads_per_layer": [4, 6, 4], "layer_types": SLIDING1, "sliding_window": 8},
    "afmoe": {**HEAD, **MOE, "num_shared_experts": 1, "layer_types": SLIDING1, "sliding_window": 8},
    "flint": {**HEAD, **MOE, **SHARED, "layer_types": SLIDING1, "sliding_window": 8},
    "beam": {**HEAD, **MOE, "layer_types": SLIDING1, "sliding_window": 8, "n_group": 1, "topk_group": 1},
    "moshi": {**HEAD, "ffn_dim": 128, "sliding_window": 128},
    "jais2": {},
    "cwm": {**HEAD, "layer_types": SLIDING1, "sliding_window": 8},
    "hyperclovax": {},
    "bitnet": {},
    "internlm3": HEAD,
    "iquestcoder": HEAD,
    "ministral3": HEAD,
    "modernbert-decoder": {"layer_types": SLIDING1, "local_attention": 8},
    "persimmon": {},
    "gpt-sw3": GPT,
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "cohere2_moe": {**HEAD, **MOE, "layer_types": SLIDING1, "sliding_window": 8},
    "granite_swa": {**GRANITE, "layer_types": SLIDING1, "sliding_window": 8},
    "granitemoe_swa": {**LOCAL, **GRANITE, "layer_types": SLIDING1, "sliding_window": 8},
    "hy_v3": {**HEAD, **MOE, "num_shared_experts": 1},
    "kolibri1": {**HEAD, **MOE, "n_shared_experts": 1, "layer_types": SLIDING1, "sliding_window": 8},
    "gemma4_unified_text": {**HEAD, "layer_types": SLIDING1, "sliding_window": 8, "per_layer_config": {}},
    "biogpt": {**DROPS, "hidden_dropout_prob": 0.0},
    "ctrl": {"n_layer": 3, "n_head": 4, "n_embd": 64, "dff": 128},
    "roberta": {"is_decoder": True},
    "camembert": {"is_decoder": True},
    "ernie": {"is_decoder": True},
    "electra": {"is_decoder": True, "embedding_size": 64},
    "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "data2vec-text": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "roc_bert": {"is_decoder": True, "enable_pronunciation": False, "enable_shape": False},
    "bert-generation": {"is_decoder": True},
    "bart": {**DECODER, **DROPS},
    "blenderbot": {**DECODER, **DROPS},
    "mbart": {**DECODER, **DROPS},
    "pegasus": {**DECODER, **DROPS},
    "marian": {**DECODER, **DROPS},
    "plbart": {**DECODER, **DROPS},
}

# What a family's own code does not do, in the teacher as in the student; test_families.py checks that the teacher indeed fails.
RESTARTS = "its recurrent layers start anew at every call of more than one token"
FIRST = "its recurrent layers look at padding in the first call only"
OWN_LIMITS: dict[str, dict[str, str]] = {
    "qwen3_next": {"padded chunks": FIRST},
    "granitemoehybrid": {"padded chunks": FIRST},
    "falcon_h1": {"padded chunks": FIRST},
    "bamba": {"maskless": "without a mask it counts the positions of every call from 0", "padded chunks": FIRST},
    "jamba": {"chunks": RESTARTS},
    "lfm2": {"padded chunks": FIRST},
    "lfm2_moe": {"padded chunks": FIRST},
    "nemotron_h": {"steps": "its recurrence step by step is 3e-4 off its chunked form"},
    "minimax": {"padded chunks": FIRST, "beams": "its cache does not reorder what its recurrent layers keep"},
    "olmo_hybrid": {"padded chunks": FIRST},
    "kimi_linear": {"padded chunks": FIRST},
    "zaya": {"padded chunks": FIRST},
    **{name: {"padding": "its positions count padding"} for name in ("bart", "blenderbot", "mbart", "pegasus", "marian", "plbart")},
}

# Models that cannot be converted: model type -> (config, words of the refusal).
PAST = "attention interface"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2}, PAST),
    "falcon": ({}, PAST),
    "gpt_neo": ({"attention_types": [[["global"], 3]]}, PAST),
    "mpt": ({"n_layers": 2}, PAST),
    "codegen": ({"n_layer": 2}, PAST),
    "gptj": ({"n_layer": 2}, PAST),
    "gpt_neox_japanese": ({}, PAST),
    "xglm": ({"num_layers": 2}, PAST),
    "trocr": ({"decoder_layers": 2}, PAST),
    "openai-gpt": ({"n_layer": 2}, PAST),
    "xlnet": ({"d_head": 16}, PAST),
    "rembert": ({"is_decoder": True}, PAST),
    "roformer": ({"is_decoder": True}, PAST),
    "megatron-bert": ({"is_decoder": True}, PAST),
    "mamba": ({}, PAST),
    "rwkv": ({}, PAST),
    "jetmoe": ({"kv_channels": 16, "num_local_experts": 4}, "without data"),
    "diffllama": ({}, "more than once"),
    "mvp": (DECODER, PAST),
    "zamba2": ({"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_key_value_heads": 4}, "more than once"),
    "hrm_text": ({}, "more than once"),
    "doge": ({}, "mask of its own"),
    "deepseek_v32": ({**LATENT, **ROUTED}, "indexed_attention"),
    "deepseek_v4": ({**HEAD, **ROUTED, "sliding_window": 8}, "Nothing to convert"),
    "hy_v4": ({**LATENT, **ROUTED}, "indexed_attention"),
    "gemma3n_text": ({**HEAD, **GEMMA3N, "num_kv_shared_layers": 1, "layer_types": SLIDING1}, "shares its keys"),
    "gemma4_text": ({**HEAD, **PER_LAYER, "per_layer_config": {}, "num_kv_shared_layers": 1, "layer_types": SLIDING1}, "shares its keys"),
    "bert-generation": ({}, "bidirectional"),
    "inkling_text": ({"layer_types": FULL3}, "position_bias"),
    "t5": ({}, "no causal language model"),
    "ministral": ({}, "cannot build"),
}
