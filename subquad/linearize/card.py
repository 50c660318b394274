"""The model card (README.md) of a student folder."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from subquad.linearize.plan import Plan

_BODY = """---
{{ card_data }}
---

# {{ name }}

Converted with [subquad] from **{{ teacher }}**: {{ heads }} of {{ total }} key/value heads became `{{ mixer }}` (window {{ window }} tokens, {{ sinks }} sinks);
{{ kept }} stay exact. Trained on {{ trained }} tokens.

| context | teacher KV bytes | student KV + state bytes |
|---|---|---|
{{ table }}

## Load

```python
import subquad  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Without the package: `AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)` runs the Python files in this folder.

## Known limits

No static cache, no assisted or speculative decoding (a recurrent state has no way back), no 4-D attention masks.

## Provenance

```json
{{ provenance }}
```
"""


def write_card(path, plan: Plan, provenance: dict[str, Any]) -> None:
    """Write README.md; `provenance` is printed as given."""
    import json

    teacher = str(provenance.get("teacher", "a softmax teacher"))
    total = sum(layer.kv_heads for layer in plan.layers)
    soft = sum(layer.soft_heads for layer in plan.layers)
    table = "\n".join(f"| {n:,} | {plan.teacher_bytes(n):,} | {plan.student_bytes(n):,} |" for n in (4096, 32768, 131072))
    base = {"base_model": teacher} if teacher.count("/") == 1 and not teacher.startswith(("/", ".")) else {}
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["subquad", "linear-attention", plan.mixer], **base
    )
    card = ModelCard.from_template(
        data, template_str=_BODY, name=f"{teacher.rstrip('/').split('/')[-1]} with {plan.mixer}", teacher=teacher, heads=soft, total=total,
        mixer=plan.mixer, window=plan.window, sinks=plan.sinks, kept=total - soft, trained=f"{provenance.get('trained_tokens', 0):,}",
        table=table, provenance=json.dumps(provenance, indent=1, default=str),
    )  # fmt: skip
    path.write_text(card.content, encoding="utf-8")
