"""float32, bfloat16, and float16 with its gradient scaler: projectors learn as the student does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.ranks import Result, launch, run

pytestmark = pytest.mark.slow

STEPS, WARM_UP = 6, 2


def config(folder: Path, name: str, warm_up: int = 0, **overrides: Any) -> dict[str, Any]:
    block = {"teacher": {"base_model": str(folder / "teacher")}}
    block |= {"objective": {"projector": {"warmup_steps": warm_up}}}
    return tiny.base_config(
        folder,
        max_steps=STEPS,
        num_epochs=10,
        output_dir=str(folder / name),
        dskd=block,
        **overrides,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    tiny.save_pair(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Result]:
    def job(name: str, precision: str, scaler: dict[str, Any], **options: Any) -> dict[str, Any]:
        made = config(folder, name, **options)
        return {"do": "train_in", "config": made, "precision": precision, **scaler}

    jobs = {
        "float32": job("float32", "the config's", {}),
        "bf16": job("bf16", "the config's", {}, bf16=True),
        "fp16": job("fp16", "fp16", {}),
        "fp16, large scale": job("large", "fp16", {"scale": 2.0**40}),
        "fp16, projectors overflow": job("overflow", "fp16", {"spoilt": 2}),
        "fp16, warm-up": job("warm", "fp16", {}, warm_up=WARM_UP, max_grad_norm=0.0),
    }
    return dict(zip(jobs, run(1, *jobs.values()), strict=True))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005)])
def test_low_precision_trains_as_float32(
    trained: dict[str, Result], precision: str, tolerance: float
):
    exact, low = trained["float32"], trained[precision]
    assert low["losses"] != exact["losses"]  # it does take part
    for a, b in zip(exact["logs"], low["logs"], strict=True):
        for name in ("loss", "dskd/ce", "dskd/projector_ce", "dskd/student_space"):
            assert b[name] == pytest.approx(a[name], abs=tolerance * a["loss"]), name
    assert [step[:2] for step in low["steps"]] == [[1.0, 1.0]] * STEPS
    for name, tensor in low["projectors"].items():
        assert tensor.dtype == torch.float32, name


def test_a_scale_that_is_too_large_is_lowered_until_both_learn(trained: dict[str, Result]):
    steps = trained["fp16, large scale"]["steps"]
    assert steps[0][:2] == [0.0, 0.0]
    assert steps[0][2] == 2.0**39
    assert all(math.isfinite(loss) for loss in trained["fp16, large scale"]["losses"])


def test_projectors_that_overflow_skip_their_step_and_lower_the_scale(
    trained: dict[str, Result],
):
    steps = trained["fp16, projectors overflow"]["steps"]
    assert [moved for _, moved, _ in steps] == [1.0, 0.0, *[1.0] * (STEPS - 2)]
    assert [scale for *_, scale in steps] == [65536.0, *[32768.0] * (STEPS - 1)]


def test_projectors_warm_up_under_a_scaler_without_gradient_clipping(trained: dict[str, Result]):
    """The student has no gradients then, of which the scaler must not complain."""
    run = trained["fp16, warm-up"]
    assert [moved for _, moved, _ in run["steps"]] == [1.0] * STEPS
    assert len(run["losses"]) == STEPS


def test_gradients_of_one_rank_that_are_not_finite_stop_all(folder: Path):
    job = config(folder, "spoilt", micro_batch_size=2)
    [ranks] = launch(2, [{"do": "train_spoilt", "config": job, "rank": 1, "step": 2}], timeout=300)
    found = (
        "ValueError: rank 1: the gradients of what dual_space trains beside the student "
        "(t2s.weight) are not finite at step 2"
    )
    assert all(rank["error"].startswith(found) for rank in ranks)
    assert "rank 0" not in ranks[0]["error"]
