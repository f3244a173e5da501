"""Projectors, and the sidecar that trains them: schedule, clipping, saving, resuming."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from axolotl_dskd.objectives.base import Beside
from axolotl_dskd.objectives.dual_space.projectors import (
    Projectors,
    SharedTokens,
    start_from_shared_tokens,
)
from axolotl_dskd.training.callbacks import StepSidecar
from axolotl_dskd.training.sidecar import Sidecar
from tests.support.dual_space import least_squares


def optimizer(D: int = 6, *, max_grad_norm: float = 1.0, weight_decay: float = 0.1) -> Sidecar:
    projectors = Projectors(4, D, with_query=True, seed=3)
    beside = Beside(learning_rate=0.01, weight_decay=weight_decay)
    return Sidecar("dual_space", {"": projectors}, {"": beside}, max_grad_norm=max_grad_norm)


def step(which: Sidecar, seed: int, factor: float = 1.0, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    loss = sum(
        p(torch.randn(5, p.in_features)).square().sum() for p in which.modules[""].children()
    )
    (loss * scale).backward()
    which.step(factor, scale)


def saved(which: Sidecar, folder: Path) -> Path:
    """A checkpoint, as far as projectors are concerned."""
    folder.mkdir(exist_ok=True)
    which.save(folder)
    (folder / "trainer_state.json").touch()
    return folder


def weights(which: Sidecar) -> dict[str, torch.Tensor]:
    return copy.deepcopy(which.modules[""].state_dict())


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = Projectors(4, 6, with_query=False, seed=5).state_dict()
    before = torch.get_rng_state()
    other = Projectors(4, 6, with_query=False, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())  # and the run's own randomness is untouched
    torch.testing.assert_close(one, other)


def test_saved_and_loaded_goes_on_exactly(tmp_path):
    straight = optimizer()
    for seed in range(3):
        step(straight, seed)
    saved(straight, tmp_path)
    resumed = optimizer()
    resumed.load(tmp_path)
    for which in (straight, resumed):
        step(which, 9)
    torch.testing.assert_close(weights(straight), weights(resumed), rtol=0, atol=0)
    files = {p.name for p in (tmp_path / "dskd").iterdir()}
    assert files == {"module.safetensors", "optimizer.safetensors", "objective.json"}


def test_a_checkpoint_without_projectors_is_refused(tmp_path):
    (tmp_path / "trainer_state.json").touch()
    with pytest.raises(ValueError, match=r"cannot be resumed as a distillation.*base_model"):
        optimizer().load(tmp_path)


@pytest.mark.parametrize(
    "missing",
    [
        "dskd/module.safetensors",
        "dskd/optimizer.safetensors",
        "dskd/objective.json",
        "dskd",
        "",
    ],
)
def test_half_a_checkpoint_is_refused_with_what_to_do(tmp_path, missing: str):
    for number in (5, 40, 300):
        half = saved(optimizer(), tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-200").mkdir()  # not complete either
    (half / "trainer_state.json").unlink()  # written last
    if missing == "dskd":
        shutil.rmtree(half / missing)
    elif missing:
        (half / missing).unlink()
    with pytest.raises(ValueError, match=r"300 is not complete.*Delete it.*checkpoint-40,"):
        optimizer().load(half)
    alone = shutil.copytree(half, tmp_path / "elsewhere" / "checkpoint-300")
    with pytest.raises(ValueError, match="start anew"):
        optimizer().load(alone)


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.safetensors", "objective.json"])
def test_a_damaged_file_is_named(tmp_path, name: str):
    saved(optimizer(), tmp_path / "checkpoint-4")
    damaged = saved(optimizer(), tmp_path / "checkpoint-8")
    path = damaged / "dskd" / name
    path.write_bytes(path.read_bytes()[:-9])
    before = weights(which := optimizer())
    with pytest.raises(ValueError, match=r"8/dskd is damaged.*Delete it.*checkpoint-4,"):
        which.load(damaged)
    torch.testing.assert_close(weights(which), before, rtol=0, atol=0)


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Also where an older one of the same name is overwritten."""
    checkpoint = saved(optimizer(), tmp_path)
    intact = (checkpoint / "dskd" / "module.safetensors").read_bytes()

    def interrupted(_tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("axolotl_dskd.training.sidecar.save_file", interrupted)
    which = optimizer()
    step(which, 0)
    with pytest.raises(OSError, match="disk full"):
        which.save(checkpoint)
    assert (checkpoint / "dskd" / "module.safetensors").read_bytes() == intact


def test_projectors_of_another_pair_are_refused(tmp_path):
    saved(optimizer(), tmp_path)
    with pytest.raises(ValueError, match="does not fit this run"):
        optimizer(D=8).load(tmp_path)


def test_the_module_of_another_objective_is_refused(tmp_path):
    saved(optimizer(), tmp_path)
    alike = Projectors(4, 6, with_query=True, seed=3)
    other = Sidecar("another", {"": alike}, {"": Beside(0.01)}, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"found dual_space .* need another"):
        other.load(tmp_path)


def test_without_a_module_a_checkpoint_tells_which_objective_wrote_it(tmp_path):
    nothing = Sidecar("uld", {}, {}, max_grad_norm=1.0)
    nothing.step(1.0)
    saved(nothing, tmp_path)
    nothing.load(tmp_path)
    with pytest.raises(ValueError, match=r"found uld .* need dual_space"):
        optimizer().load(tmp_path)


def test_the_schedule_factor_scales_the_step():
    whole, half = optimizer(weight_decay=0.0), optimizer(weight_decay=0.0)
    start = weights(whole)
    step(whole, 0, 1.0)
    step(half, 0, 0.5)
    for name, value in weights(half).items():
        torch.testing.assert_close(2 * (value - start[name]), weights(whole)[name] - start[name])


@pytest.mark.parametrize("warms_up", [False, True])
def test_a_schedule_never_exceeds_the_configured_rate(warms_up: bool):
    student = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.01)
    if warms_up:  # one_cycle begins at a twenty-fifth of it
        schedule: Any = torch.optim.lr_scheduler.OneCycleLR(student, max_lr=0.01, total_steps=9)
    else:
        schedule = torch.optim.lr_scheduler.LinearLR(student, 1.0, 0.0, total_iters=9)
    follows = StepSidecar(optimizer(), scaler=lambda: None, loss_scale=lambda: 1.0)
    factors = []
    for _ in range(8):
        follows.on_step_begin(SimpleNamespace(learning_rate=0.01), None, None, optimizer=student)
        factors.append(follows.schedule_factor)
        assert student.param_groups[0]["lr"] == pytest.approx(0.01 * factors[-1])
        student.step()
        schedule.step()
    assert 0.9 < max(factors) <= 1.0


def scaled_step(which: Sidecar, scaler: torch.amp.GradScaler, factor: float) -> None:
    """As the training loop: backward, the projectors, the student, the scaler's update."""
    student = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([student], lr=0.1)
    torch.manual_seed(0)
    loss = sum(
        p(torch.randn(5, p.in_features)).square().sum() for p in which.modules[""].children()
    )
    scaler.scale(loss + student.sum()).backward()
    which.modules[""].t2s.weight.grad *= factor
    which.step(1.0, scaler=scaler)
    scaler.step(adamw)
    scaler.update()
    assert not torch.equal(student, torch.ones(3))  # the student's gradients are finite


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0, 100.0])
def test_a_gradient_scaler_does_not_change_the_step(max_grad_norm: float):
    """Clipping included: it sees the unscaled gradients. Adam's moments tell, its steps hardly."""
    plain, scaled, by_number = (optimizer(max_grad_norm=max_grad_norm) for _ in range(3))
    step(plain, 0)
    step(by_number, 0, scale=1024.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(scaled, scaler, 1.0)
    for which in (scaled, by_number):
        torch.testing.assert_close(weights(which), weights(plain), rtol=0, atol=1e-6)
        for ours, theirs in zip(
            which.adamw.state.values(), plain.adamw.state.values(), strict=True
        ):
            torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"])
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("scale", [1024.0, 1.0])
def test_an_overflow_skips_the_step_and_lowers_the_scale(scale: float):
    """Otherwise projectors that overflow alone would never learn again."""
    which = optimizer()
    start = weights(which)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaled_step(which, scaler, float("inf"))
    torch.testing.assert_close(weights(which), start, rtol=0, atol=0)
    assert scaler.get_scale() == scale / 2
    scaled_step(which, scaler, 1.0)
    assert not torch.equal(weights(which)["t2s.weight"], start["t2s.weight"])


def test_gradients_that_are_not_finite_stop_the_run():
    which = optimizer()
    which.modules[""].t2s.weight.grad = torch.full((4, 6), float("nan"))
    with pytest.raises(
        ValueError, match=r"\(t2s.weight\) are not finite at step 1 .*learning_rate"
    ):
        which.step(1.0)


def test_a_step_without_any_gradient_is_a_step_of_zeros():
    which = optimizer(weight_decay=0.0)
    start = weights(which)
    which.step(1.0)
    torch.testing.assert_close(weights(which), start)


def shared(k: int, d: int = 4, D: int = 6) -> SharedTokens:
    generator = torch.Generator().manual_seed(0)
    return SharedTokens(*(torch.randn(k, n, generator=generator) for n in (d, d, D, D)))


def test_least_squares_is_the_pseudo_inverse():
    rows = shared(500, 40, 60)
    expected = torch.linalg.pinv(rows.student_head.double()) @ rows.teacher_head.double()
    torch.testing.assert_close(
        least_squares(rows.student_head, rows.teacher_head), expected.float(), rtol=1e-5, atol=1e-6
    )


def test_projected_states_keep_the_logits_of_shared_tokens():
    """Where an exact map exists, the start finds it."""
    rows = shared(50)
    exact = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    rows = dataclasses.replace(rows, teacher_head=rows.student_head @ exact)
    projectors = Projectors(4, 6, with_query=False, seed=0)
    start_from_shared_tokens(projectors, [rows])
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        projectors.t2s(states) @ rows.student_head.T,
        states @ rows.teacher_head.T,
        rtol=1e-4,
        atol=1e-4,
    )


def test_equal_tokens_attend_to_each_other_from_the_start():
    rows = shared(400, 40, 60)
    mixing = torch.randn(60, 40, generator=torch.Generator().manual_seed(1))
    rows = dataclasses.replace(rows, student_embedding=rows.teacher_embedding @ mixing)
    projectors = Projectors(40, 60, with_query=True, seed=0)
    start_from_shared_tokens(projectors, [rows])
    x, y = torch.arange(0, 20), torch.arange(1, 21)
    query = projectors.query(torch.cat([rows.student_embedding[i] for i in (x, y)], 1))
    key = torch.cat([rows.teacher_embedding[i] for i in (x, y)], 1)
    scores = query @ (key / key.std()).T
    assert torch.equal(scores.argmax(1), torch.arange(20))


def test_the_least_squares_start_makes_up_for_the_heads_biases():
    rows = shared(50)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(4))
    exact = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    shift = torch.randn(4, generator=torch.Generator().manual_seed(3))
    rows = dataclasses.replace(
        rows,
        teacher_head=rows.student_head @ exact,
        student_bias=bias,
        teacher_bias=bias + rows.student_head @ shift,
    )
    projectors = Projectors(4, 6, with_query=False, seed=0)
    start_from_shared_tokens(projectors, [rows])
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        projectors.t2s(states) @ rows.student_head.T + bias,
        states @ rows.teacher_head.T + rows.teacher_bias,
        rtol=1e-4,
        atol=1e-4,
    )
    states = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        projectors.s2t(states) @ rows.teacher_head.T + rows.teacher_bias,
        states @ rows.student_head.T + bias,
        rtol=1e-3,
        atol=1e-3,
    )
