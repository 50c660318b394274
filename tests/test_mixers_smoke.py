"""`subquad run quickstart --set plan.mixer=NAME --smoke` for every causal preset, in one process and on a tiny random model.

`make smoke-mixers` is the same loop over the command line and the recipe's own model.
"""

import pytest

from subquad.errors import UserError
from subquad.linearize.mixers import causal
from subquad.linearize.mixers.describe import constant
from subquad.progress import Reporter
from subquad.recipe import load_recipe
from subquad.run import run


@pytest.mark.parametrize("name", causal())
def test_quickstart_smoke(name, teacher_folder, text_file, tmp_path):
    sets = [f"teacher={teacher_folder}", f"data.train={text_file}", f"plan.mixer={name}", "plan.window=8", "plan.sinks=2"]
    sets += ["evals={perplexity: {context: 64, windows: 1}}", "select.tokens=64", "select.context=64"]
    sets += ["stages.0.tokens=64", "stages.0.context=64", "sample.new_tokens=2"]
    recipe = load_recipe("quickstart", sets)
    if not constant(name):  # the recipe's 20 % of the key/value bytes are out of reach: the whole recipe is refused, smoke says that it leaves them out
        with pytest.raises(UserError, match="budget: kv_bytes"):
            run(recipe, tmp_path / "refused", report=Reporter())
    rows = run(recipe, tmp_path / "run", smoke=True, report=Reporter())
    student = [row for row in rows if row["model"] == "student"]
    assert student and all(row["value"] is not None for row in student)
