"""Run as a program by test_hub.py, in a new process: load a student folder one of the two ways and say what it computes.

Usage: hub_worker.py package|remote FOLDER PROMPTS OUT. PROMPTS: JSON list of token id lists. `remote` runs without the package: importing it fails.
"""

import json
import sys
from pathlib import Path

import torch

WAY, FOLDER, PROMPTS, OUT = sys.argv[1:]
torch.set_num_threads(1)
if WAY == "package":
    import subquad  # noqa: F401
else:
    sys.modules["subquad"] = None  # import subquad -> ImportError

from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

refusals = []
if WAY == "remote":  # plain transformers must refuse rather than run the teacher with the student's weights
    for call in (AutoConfig, AutoModelForCausalLM):
        try:
            call.from_pretrained(FOLDER, trust_remote_code=False)
        except ValueError as error:
            refusals.append(str(error))

more = {"trust_remote_code": True} if WAY == "remote" else {}
model = AutoModelForCausalLM.from_pretrained(FOLDER, **more).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **more)
prompts = json.loads(Path(PROMPTS).read_text())
arguments = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=256)


def text(ids, **kwargs) -> list[list[int]]:
    return model.generate(torch.tensor(ids), **arguments, **kwargs)[:, len(ids[0]) :].tolist()


width = max(map(len, prompts))
padded = [[0] * (width - len(p)) + p for p in prompts]
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
with torch.no_grad():
    logits = {f"logits{i}": model(input_ids=torch.tensor([p])).logits.contiguous() for i, p in enumerate(prompts)}
out = Path(OUT)
save_file(logits, out / "logits.safetensors")
report = {
    "refusals": refusals,
    "alone": [text([p])[0] for p in prompts],
    "without cache": [text([p], use_cache=False)[0] for p in prompts],
    "batch": text(padded, attention_mask=mask),
    "tokens": tokenizer("river").input_ids,
    "class": type(model).__name__,
    "modules": sorted(m for m in sys.modules if m.split(".")[0] == "subquad" and sys.modules[m] is not None),
}
(out / "report.json").write_text(json.dumps(report))
model.save_pretrained(out / "again")
