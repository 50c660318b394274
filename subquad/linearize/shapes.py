"""Find the attention layers of any transformers model, and their sizes, by watching what arrives at the seam. No table of families.

The model is built on the meta device (no weights, no memory) and called with two tokens under a recording attention function. Where another part
of the model cannot run without data (expert routing, length-dependent rotary scaling), data-dependent questions are answered by a fixed value:
only shapes are read here.

Key: B batch, T tokens, H query heads, G key/value heads, K key size, V value size.
"""

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from subquad.errors import UserError, first_line
from subquad.linearize.seam import is_causal

PROBE = "subquad_probe"
TOKENS = 2
_seen: list = []
_inputs: dict[type, tuple] = {}  # class of attention module -> (args, kwargs) of its latest call
_known: dict[tuple, list["Found"]] = {}  # of the latest configs: `plan` and `linearize` ask about the same model
KNOWN = 8


@dataclass(frozen=True)
class Found:
    """One attention module that goes through the attention interface."""

    name: str
    index: int
    hidden: int
    query_heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None  # the teacher's own sliding window
    kind: str  # the config's layer type; full_attention when it says nothing
    causal: bool
    arguments: tuple[str, ...]  # what else arrives at the seam with a value
    tensors: tuple[str, ...]  # those of them that are tensors
    cached: int = 0  # numbers per token that it puts into a cache; 0: as many as its keys and values have
    problem: str = ""  # why no mixer can stand here, whatever its kind


def _record(module, query, key, value, attention_mask=None, **kwargs):
    args, named = _inputs[type(module)]
    given = {_storage(x) for x in tree_leaves((args, named)) if isinstance(x, torch.Tensor)}
    own_mask = isinstance(attention_mask, torch.Tensor) and _storage(attention_mask) not in given  # a part of what the model gave it is not
    hidden = next((x.shape[-1] for x in (*args, *named.values()) if isinstance(x, torch.Tensor) and x.dim() == 3), 0)
    arguments = {k: v for k, v in kwargs.items() if v is not None}
    _seen.append((module, hidden, query.shape, key.shape, value.shape, arguments, own_mask, key))
    B, H, T, _ = query.shape
    return value.new_zeros(B, T, H, value.shape[-1]), None


def _storage(x: torch.Tensor) -> int:
    """The same number for a tensor and its views."""
    return x.untyped_storage()._cdata


AttentionInterface.register(PROBE, _record)


class _Watch(DynamicCache):
    """A cache that keeps nothing and notes how much it was given for one token."""

    given = 0

    def update(self, key_states, value_states, *args, **kwargs):
        self.given = (key_states.numel() + value_states.numel()) // TOKENS
        return key_states, value_states


class _AnswerAnything(TorchDispatchMode):
    """Meta tensors have no values: numbers read from them are 1, index searches find nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return False if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and args[0].device.type == "meta":
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if func is torch.ops.aten._grouped_mm.default:  # its meta version knows bfloat16 only (torch 2.13)
            return args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


def empty_model(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """The model of a config on the meta device."""
    config = copy.deepcopy(config)
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            make = cls._from_config if cls else AutoModelForCausalLM.from_config
            return make(config, attn_implementation="eager").eval()  # which gives every layer a mask
    finally:
        logging.getLogger("transformers").setLevel(level)


def attention_layers(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> list[Found]:
    """Every self-attention module that calls the attention interface, in layer order. UserError for models where none does."""
    key = (cls, type(config), repr(config.to_dict()))
    if key not in _known:
        _known[key] = _look(config, cls)
        for oldest in list(_known)[:-KNOWN]:
            del _known[oldest]
    return list(_known[key])


def _look(config: PreTrainedConfig, cls: type[PreTrainedModel] | None) -> list[Found]:
    try:
        model = empty_model(config, cls)
    except Exception as error:  # whatever the model's own code makes of the config
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"transformers has no causal language model for model type {config.model_type!r}; give one that it has."
            ) from error
        raise UserError(
            f"transformers cannot build a causal language model of type {config.model_type!r} from this config "
            f"({type(error).__name__}: {first_line(error)}). Complete its config.json, or install what it asks for."
        ) from error
    candidates = {m: name for name, m in model.named_modules() if _is_candidate(m)}
    numbered = {m: name for m, name in candidates.items() if isinstance(getattr(m, "layer_idx", None), int)}
    candidates = numbered or candidates  # an image tower inside a decoder has no numbers, and is not what is converted
    handles = [m.register_forward_pre_hook(lambda m, a, k: _inputs.__setitem__(type(m), (a, k)), with_kwargs=True) for m in candidates]
    for module in candidates:
        module.config = copy.copy(module.config)
        module.config.__dict__["_attn_implementation_internal"] = PROBE
    _seen.clear()
    _inputs.clear()
    with torch.no_grad(), _AnswerAnything():
        decodes = "use_cache" in inspect.signature(model.forward).parameters or hasattr(config, "use_cache")
        failure = _run(lambda: model(**_inputs_of(model), **({"use_cache": False} if decodes else {})))
        reached = {entry[0] for entry in _seen}
        for handle in handles:
            handle.remove()
        for module in candidates:  # what stopped the model was not attention: call the rest as their likes were called
            if failure is not None and module not in reached and type(module) in _inputs:
                args, kwargs = _inputs[type(module)]
                _run(lambda module=module, args=args, kwargs=kwargs: module(*args, **kwargs))
    entries = {entry[0]: entry for entry in _seen}
    problems, cached = _problems(), _cached(entries)
    order = {m: i for i, m in enumerate(m for m in candidates if m in entries)}
    found = [_found(candidates[m], m, order[m], *entry[1:6], config, problems.get(m, ""), cached.get(m, 0)) for m, entry in entries.items()]
    _seen.clear()
    _inputs.clear()
    if not found and failure and model._supports_attention_backend:
        raise UserError(
            f"Model type {config.model_type!r} cannot be converted: its attention layers could not be found, because its layers do not run on tensors "
            f"without data ({type(failure).__name__}: {first_line(failure)})."
        )
    if not found:
        raise UserError(
            f"Model type {config.model_type!r} cannot be converted: no attention of it goes through transformers' attention interface, "
            "which is where a mixer is put in. That of models such as llama, qwen, mistral, gemma, phi, gpt2 or gpt_neox does."
        )
    return sorted(found, key=lambda f: f.index)


def _is_candidate(module: nn.Module) -> bool:
    """Decoders' attention modules know their layer; those of encoders without a cache say that they are not causal, and come in layer order."""
    known = isinstance(getattr(module, "layer_idx", None), int) or getattr(module, "is_causal", None) is False
    return known and isinstance(getattr(module, "config", None), PreTrainedConfig)


def _inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model is called with: two tokens, or one image."""
    if model.main_input_name != "pixel_values":
        return {"input_ids": torch.ones(1, TOKENS, dtype=torch.long, device="meta")}
    config = model.config
    size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size, config.image_size)
    return {"pixel_values": torch.empty(1, config.num_channels, *size, device="meta")}


def _run(call) -> Exception | None:
    try:
        call()
    except Exception as error:  # any part of any model may fail on tensors without data; the caller judges by what was recorded
        return error
    return None


def _problems() -> dict[nn.Module, str]:
    """Recorded modules that no mixer can take the place of, and why."""
    calls = Counter(entry[0] for entry in _seen)
    layers = Counter(index for module in calls if (index := getattr(module, "layer_idx", None)) is not None)
    problems = {}
    owners: dict[int, set] = {}
    for module, *_, key in _seen:
        owners.setdefault(_storage(key), set()).add(module)
    for module, _, asked, shape, _, _, own_mask, key in _seen:
        index = getattr(module, "layer_idx", None)
        if calls[module] > 1 or (index is not None and (index < 0 or layers[index] > 1)):
            problems[module] = (
                "it attends more than once per token (shared between layers, or two softmaxes), and a mixer has one state. Keep it exact."
            )
        elif len(owners[_storage(key)]) > 1:
            problems[module] = "it shares its keys with another layer, and a mixer has them to itself. Keep it exact."
        elif is_causal(module) and not _takes_cache(module):  # encoders keep nothing
            problems[module] = "it keeps its keys elsewhere than in a transformers cache. Keep it exact."
        elif shape[2] != asked[2]:
            problems[module] = "it attends to something else than one key per token. Keep it exact."
        elif own_mask:
            problems[module] = (
                "it makes an attention mask of its own out of what it computes, which a recurrent state cannot honour. Keep it exact."
            )
    return problems


def _takes_cache(module: nn.Module) -> bool:
    return any(name.startswith(("past_key_value", "layer_past")) for name in inspect.signature(module.forward).parameters)


def _cached(modules: Iterable[nn.Module]) -> dict[nn.Module, int]:
    """Numbers per token that recorded modules put into a cache: each is called once more, alone, as its like was called, with a cache that watches."""
    found = {}
    for module in modules:
        args, kwargs = _inputs[type(module)]
        watch = _Watch()
        if "past_key_values" in kwargs:
            with torch.no_grad(), _AnswerAnything():
                _run(lambda module=module, args=args, kwargs={**kwargs, "past_key_values": watch}: module(*args, **kwargs))
        if watch.given:
            found[module] = watch.given
    return found


def _found(name, module, order, hidden, q, k, v, arguments, config, problem, cached) -> Found:
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    index = order if getattr(module, "layer_idx", None) is None else module.layer_idx
    kind = kinds[index] if index < len(kinds) else "full_attention"
    return Found(
        name=name,
        index=index,
        hidden=hidden,
        query_heads=q[1],
        kv_heads=k[1],
        key=k[3],
        value=v[3],
        window=arguments.get("sliding_window"),
        kind=kind,
        causal=is_causal(module),
        arguments=tuple(sorted(arguments)),
        tensors=tuple(sorted(name for name, value in arguments.items() if isinstance(value, torch.Tensor))),
        cached=0 if cached == k[1] * (k[3] + v[3]) else cached,
        problem=problem,
    )
