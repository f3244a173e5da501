"""The architecture's README: the objective that it writes is one, and runs by hand as it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import axolotl_dskd

README = Path(axolotl_dskd.__file__).parent / "README.md"


def test_the_objective_of_the_readme_runs_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    method, by_hand = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_method.py").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    found: dict = {}
    exec(by_hand, found)
    student, teacher, out = found["student_view"], found["teacher_view"], found["out"]
    log_q, log_p = (
        (view.hidden.detach() @ view.head.weight.T).log_softmax(-1) for view in (student, teacher)
    )
    kl = (log_q.exp() * (log_q - log_p)).sum()
    ce = -log_q.gather(-1, student.tokens.labels[:, None]).sum()
    torch.testing.assert_close(out.loss.detach(), 0.5 * (kl + ce))
    assert student.hidden.grad.abs().sum() > 0
    sys.modules.pop("my_package.my_method")
