import pytest

from subquad.distill.log import JsonLog, timeless
from subquad.errors import UserError


def test_rewind_drops_later_rows_of_the_stage_and_a_torn_line(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.rewind("heal", 0)  # nothing there yet
    for stage, step in (("select", 1), ("select", 9), ("heal", 1), ("heal", 2), ("heal", 3)):
        log.write({"stage": stage, "step": step, "loss": 1 / (step + 2)})
    log.write({"note": "a row of something else"})
    with log.path.open("a") as file:
        file.write('{"stage": "heal", "st')
    log.rewind("heal", 1)
    log.write({"stage": "heal", "step": 2})
    rows = log.rows()
    assert [(row.get("stage"), row.get("step")) for row in rows] == [("select", 1), ("select", 9), ("heal", 1), (None, None), ("heal", 2)]
    assert rows[2]["loss"] == 1 / 3
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_timeless():
    assert timeless({"step": 1, "loss": 2.0, "time": 3.0, "tokens_per_second": 4.0}) == {"step": 1, "loss": 2.0}


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="Cannot write the log"):
        JsonLog(tmp_path / "missing" / "log.jsonl").write({})
