"""Small models, tokenizers and recipes made on the spot: nothing is downloaded, every test starts from the same numbers."""

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CORPUS = Path(os.environ.get("SUBQUAD_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpus"

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}


def tiny_model(model_type: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random fp32 model of any transformers family; llama sizes unless `config` says otherwise."""
    torch.manual_seed(seed)
    settings = {**SIZES, **TOKENS, "initializer_range": 0.2, **config}  # at 0.02 a random model's logits are all alike
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (0-255), 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>")


def save_teacher(folder: Path, **config: Any) -> Path:
    """A tiny teacher with its tokenizer, as a folder that load_teacher opens."""
    tiny_model(**config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def words(count: int, seed: int = 0) -> str:
    """Text of `count` words out of 50, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    known = [
        f"{a}{b}"
        for a in ("river", "stone", "light", "under", "seven")
        for b in ("s", "ing", "ly", " of", " and", "", "er", "en", "-", ".")
    ]
    return " ".join(known[i] for i in torch.randint(len(known), (count,), generator=generator).tolist())


def tiny_recipe(teacher: Path, text: Path, /, **changes: Any) -> dict[str, Any]:
    """A recipe that runs from selection to sample in a few seconds."""
    stage = {"name": "heal", "train": "attention", "inputs": "own", "losses": {"kl": 1.0}, "tokens": 256, "context": 32, "lr": 1e-3}
    recipe = {
        "teacher": str(teacher),
        "plan": {"mixer": "window", "window": 8, "sinks": 2},
        "select": {"method": "gates", "tokens": 128, "context": 32},
        "budget": {"kv_bytes": 0.4, "at": 1024},
        "stages": [stage],
        "data": {"train": str(text), "hold_out": 0.2},
        "evals": {"perplexity": {"context": 32, "windows": 2}},
        "sample": {"prompt": "river", "new_tokens": 4},
    }
    return {**recipe, **changes}


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def keys_of(row: dict) -> set[str]:
    """The keys a row of the first set of evals has, neither more nor less: perplexities carry standard errors, and their ratios paired ones."""
    plain = {"model", "metric", "setting", "value", "ratio"}
    if "perplexity" not in row["metric"]:
        return plain
    return plain | {"n", "stderr"} | ({"ratio_stderr"} if row["model"] != "teacher" else set())
