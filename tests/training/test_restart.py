"""Where memory runs out, `auto_find_batch_size` begins a training again with fewer rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axolotl_dskd.evaluation.record import read_record
from tests.support import tiny
from tests.support.equivalence import ROWS, save_pair, training_config
from tests.support.ranks import run
from tests.support.taught import teach

pytestmark = pytest.mark.slow

#: Written in every step until so many rows are kept, then mostly these.
SAMPLES = {
    "from": "student",
    "share": 1.0,
    "replay": 7,
    "replay_schedule": "decreasing",
    "max_new_tokens": 16,
    "seed": 131,
}


def test_what_was_written_and_counted_before_starts_again(tmp_path: Path):
    """The student learns nothing here, so a training of as few rows from the start is the same."""
    folder = save_pair(tmp_path)
    teach(folder / "student", tiny.chat_rows(ROWS))

    def config(name: str, rows: int, **overrides: Any) -> dict[str, Any]:
        block = {"samples": SAMPLES, "objective": {"name": "policy"}}
        more = {
            "micro_batch_size": rows,
            "max_steps": 5,
            "learning_rate": 1e-12,
            "curriculum_sampling": True,  # in the order of the data
            "val_set_size": 0.25,
            "eval_steps": 2,
            **overrides,
        }
        made = training_config(folder, block, name, more)
        answers = {"answers": 2, "answers_every": 3, "max_new_tokens": 4, "record": True}
        made["dskd"]["evaluation"] = answers
        return made

    again, plain = run(
        1,
        {
            "do": "train_out_of_memory",
            "config": config("again", 4, auto_find_batch_size=True),
            "step": 3,
        },
        {"do": "train", "config": config("plain", 3)},
    )
    assert len(again["logs"]) == 5
    names = {name for log in plain["logs"] for name in log if name.startswith("dskd/")}
    names -= {"dskd/written_tokens_per_second"}
    assert {"dskd/kept_rows", "dskd/answer_tokens", "dskd/supervised_tokens"} <= names
    for ours, theirs in zip(again["logs"], plain["logs"], strict=True):
        for name in names & theirs.keys():
            if name.rpartition("/")[2] not in ("advantage", "policy"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    found, expected = (evaluations(folder / name) for name in ("again", "plain"))
    assert found[-len(expected) :] == expected


def evaluations(folder: Path) -> list[tuple[int, int, int]]:
    """Steps, tokens learned by then, and answers, of what a run has recorded."""
    return [
        (line["step"], line["learned_tokens"], len(line["answers"]))
        for line in read_record(folder)
        if "evaluation" in line
    ]
