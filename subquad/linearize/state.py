"""What one converted layer remembers between tokens. It takes the place of the stock layer inside whatever transformers Cache a call brings.

Key: B batch, E exact key/value heads, G converted key/value heads, S tokens so far (padding included), W slots of the window, N sinks, K key size, V value size.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from subquad.errors import UserError

# Per-row tensors of the mixer's part, all reordered together under beam search.
_ROWS = ("window_k", "window_v", "window_extra", "sink_k", "sink_v", "memory", "seen_B")


class MixerState(CacheLayerMixin):
    """keys/values [B, E, S, K | V]: full memory of the exact heads only (E = 0 without any).

    window_k, window_v [B, W', G, K | V], W' <= window: the last real tokens of each row, right-aligned; window_extra [B, W', G, X]: per-token
    gates a mixer wants to keep with them; sink_k, sink_v [B, N, G, K | V]; memory: fp32 recurrent state; seen_B: real tokens so far in each row.
    `length` counts all tokens, padding included: it is what transformers calls the sequence length. In a layer where the teacher runs a sliding
    window of its own, exact heads keep that window only, and masks are sized as for transformers' own sliding layers.
    """

    is_croppable = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, sliding_window: int | None = None):
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.length = 0
        self.fewest = 0  # lower bound of seen_B, a Python number
        self.updated = False
        for name in _ROWS:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_empty(x.shape[0], 0, 0, x.shape[-1]) for x in (key_states, value_states))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Called by the model's attention module: note that the tokens came by and hand them on; the seam does the rest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.updated = True
        return key_states, value_states

    def extend_exact(self, k_BETK: Tensor, v_BETV: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the exact heads' keys and values and return what the mask of this call covers."""
        keys = k_BETK.contiguous() if not self.keys.shape[1] else torch.cat([self.keys, k_BETK], 2)
        values = v_BETV.contiguous() if not self.values.shape[1] else torch.cat([self.values, v_BETV], 2)
        keep = 0 if self.sliding_window is None else max(keys.shape[2] - self.sliding_window + 1, 0)
        self.keys, self.values = keys[:, :, keep:], values[:, :, keep:]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.length if self.sliding_window is None else min(self.length, self.sliding_window - 1)
        return kept + query_length, self.length - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def _map(self, fn) -> None:
        for name in (*_ROWS, "keys", "values"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, fn(value))

    def reset(self) -> None:
        self.__init__(self.sliding_window)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                f"A converted layer cannot forget its last {tokens_to_remove} tokens: a recurrent state has no way back. "
                "Assisted and speculative decoding need that; generate without assistant_model / prompt_lookup_num_tokens."
            )

    def tensors(self) -> list[Tensor]:
        return [x for name in (*_ROWS, "keys", "values") if (x := getattr(self, name)) is not None]


class HybridState(MixerState, LinearAttentionAndFullAttentionLayer):
    """For layers that run attention and a recurrence of the teacher's own side by side: the recurrence keeps its states where it finds them."""

    def __init__(self, sliding_window: int | None = None, number_of_states: int = 1):
        MixerState.__init__(self, sliding_window)
        LinearAttentionLayer.__init__(self, number_of_states)

    @classmethod
    def adopt(cls, layer: LinearAttentionLayer, sliding_window: int | None) -> "HybridState":
        """With the states of a stock layer: the recurrence may have run before attention in this very call."""
        state = cls(sliding_window, layer.number_of_states)
        for name in (
            "conv_states",
            "recurrent_states",
            "is_conv_states_initialized",
            "is_recurrent_states_initialized",
            "has_previous_state",
            "conv_kernel_size",
        ):
            setattr(state, name, getattr(layer, name))
        state.dtype, state.device = layer.dtype, layer.device
        return state

    def lazy_initialization(self, *args, **kwargs) -> None:
        (MixerState if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def _map(self, fn) -> None:
        super()._map(fn)
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: fn(x) for i, x in states.items() if x is not None})

    def reset(self) -> None:
        self.__init__(self.sliding_window, self.number_of_states)

    def tensors(self) -> list[Tensor]:
        return super().tensors() + [x for states in (self.conv_states, self.recurrent_states) for x in states.values() if x is not None]


def state_of(cache: Cache, layer_idx: int, sliding_window: int | None = None) -> MixerState:
    """The converted layer's state inside `cache`, put there on first use. Refuses caches it cannot live in."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if getattr(cache, "offloading", False):
        raise UserError("Converted layers keep small states on the device: use a cache without offloading (plain DynamicCache).")
    while len(cache.layers) <= layer_idx:
        if cache.layer_class_to_replicate is None:
            raise UserError(
                f"The cache has {len(cache.layers)} layers but layer {layer_idx} asks for one: build it with DynamicCache(config=model.config)."
            )
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, MixerState):
        return layer
    kind = type(layer).__name__
    if "Static" in kind or "Quantized" in kind:
        raise UserError(
            f"{kind} cannot hold the state of a converted layer: generate with the default dynamic cache (leave cache_implementation unset). "
            "A converted layer's memory does not grow, so a static one would save nothing."
        )
    if layer.get_seq_length() > 0:
        raise UserError(
            f"Layer {layer_idx} of the cache was filled by another model ({layer.get_seq_length()} tokens): start this model with a fresh cache."
        )
    hybrid = isinstance(layer, LinearAttentionLayer)
    cache.layers[layer_idx] = HybridState.adopt(layer, sliding_window) if hybrid else MixerState(sliding_window)
    return cache.layers[layer_idx]


def cache_bytes(cache: Cache) -> int:
    """Bytes of every tensor a Cache holds, converted and stock layers alike."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    total = 0
    for layer in cache.layers:
        if isinstance(layer, MixerState):
            tensors = layer.tensors()
        else:
            states = (getattr(layer, name, None) for name in ("conv_states", "recurrent_states"))
            tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
            tensors += [x for d in states if isinstance(d, dict) for x in d.values()]
        total += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
    return total
