"""Answers in the log and in the trackers that are open, and that no tracker stops a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerCallback
from transformers.integrations import (
    CometCallback,
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
)

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.generation import Answer
from axolotl_dskd.samples.asking import Place
from axolotl_dskd.samples.showing import TABLE, Showing
from axolotl_dskd.training.tables import Rows, Tables
from tests.support.conversations import answered, prepared

NAME = "dskd/answers"
ROWS = [
    {"step": 3, "prompt": "a | b\n<c>", "answer": "d", "tokens": 1, "ended": True},
    {"step": 3, "prompt": "e", "answer": "你好", "tokens": 2, "ended": False},
]


def tables(*callbacks: Any) -> Tables:
    return Tables(lambda: [TrainerCallback(), *callbacks])


def test_tensorboard_has_the_rows_as_text(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    callback = TensorBoardCallback(SummaryWriter(str(tmp_path)))
    tables(callback)(NAME, 3, ROWS)
    callback.on_train_end(None, None, None)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    (tag,) = found.Tags()["tensors"]
    assert tag.startswith(NAME)
    (event,) = found.Tensors(tag)
    assert event.step == 3
    (text,) = event.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[0] == "| step | prompt | answer | tokens | ended |"
    assert lines[2] == "| 3 | a &#124; b<br>&lt;c> | d | 1 | True |"
    assert lines[3] == "| 3 | e | 你好 | 2 | False |"
    with caplog.at_level("WARNING", "axolotl_dskd.training.tables"):
        tables(callback)(NAME, 4, ROWS)  # is closed by now
    assert not caplog.records


def test_wandb_has_the_rows_as_a_table_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    monkeypatch.chdir(tmp_path)
    callback = WandbCallback()
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(console="off"))
    try:
        tables(callback)(NAME, 3, ROWS)  # its callback has not begun
        assert NAME not in dict(run.summary)
        callback._initialized = True
        tables(callback)(NAME, 3, ROWS)
        assert run.summary["train/global_step"] == 3
        assert dict(run.summary)[NAME]["nrows"] == len(ROWS)
    finally:
        wandb.finish()
    tables(callback)(NAME, 4, ROWS)  # no run is open


def without_library(kind: type, **fields: Any) -> Any:
    """A callback whose tracker is not installed, as it is where that one is open."""
    callback = object.__new__(kind)
    callback.__dict__.update(fields)
    return callback


def test_mlflow_and_comet_are_called_as_their_documentation_says():
    logged: list[Any] = []
    mlflow = SimpleNamespace(
        active_run=lambda: "a run",
        log_table=lambda data, artifact_file: logged.append((data, artifact_file)),
    )
    comet = SimpleNamespace(
        log_text=lambda text, step, metadata: logged.append((text, step, metadata))
    )
    tables(
        without_library(MLflowCallback, _initialized=True, _ml_flow=mlflow, _auto_end_run=False),
        without_library(CometCallback, _experiment=comet),
    )(NAME, 3, ROWS)
    (columns, file), *texts = logged
    assert file == f"{NAME}.json"
    assert columns == {key: [row[key] for row in ROWS] for key in ROWS[0]}
    assert [(step, about["answer"]) for _, step, about in texts] == [(3, "d"), (3, "你好")]
    assert "你好" in texts[1][0]


def test_a_tracker_that_refuses_is_named_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    said: list[Any] = []

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the tracker")

    writer = SimpleNamespace(add_text=lambda *found: said.append(found), close=lambda: None)
    found = tables(
        without_library(CometCallback, _experiment=SimpleNamespace(log_text=refuse)),
        TensorBoardCallback(cast(Any, writer)),
    )
    with caplog.at_level("WARNING", "axolotl_dskd.training.tables"):
        for step in (3, 4):
            found(NAME, step, ROWS)
    assert [step for _, _, step in said] == [3, 4]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Comet does not take the table dskd/answers: ConnectionError")


# ---- when answers are shown, and which ----------------------------------------------------------

PAIR = ("tiny byte-level", "tiny sentencepiece")


def shown(steps: list[int], rank: int = 0, **keys: Any) -> list[tuple[str, int, Rows]]:
    config = StudentSamplesConfig.model_validate({"from": "student", **keys})
    tables: list[tuple[str, int, Rows]] = []
    run = SimpleNamespace(
        rank=rank,
        decode=lambda ids: " ".join(map(str, ids)),
        table=lambda *table: tables.append(table),
    )
    show = Showing(config, cast(Any, run))
    prompt = answered(PAIR).prompt(prepared(PAIR, [("Add.", "Five.")]))
    assert prompt is not None
    places = [Place([], k, prompt, k, None) for k in range(3)]
    for step in steps:
        show(step, places, [Answer([step, k], [], ended=not k) for k in range(3)])
    show(10**6, [], [])
    return tables


def test_the_first_answers_of_every_kth_step_are_shown():
    found = shown([0, 1, 4, 7, 8, 10], show_every=5, show_count=2)
    assert [(name, step) for name, step, _ in found] == [(TABLE, 1), (TABLE, 8), (TABLE, 11)]
    rows = found[1][2]
    assert [row["answer"] for row in rows] == ["7 0", "7 1"]
    assert [(row["tokens"], row["ended"], row["step"]) for row in rows] == [
        (2, True, 8),
        (2, False, 8),
    ]


def test_nothing_is_shown_by_other_ranks_or_where_none_is_asked_for():
    assert shown([0, 1, 2], rank=1) == []
    assert shown([0, 1, 2], show_every=0) == []
