"""A real vLLM that gives log-probabilities: the training is that of the live teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from axolotl_dskd.teacher.served.logprob_teacher import LogprobTeacher
from tests.support import tiny
from tests.support.runs import losses, teacher_of
from tests.support.vllm import VLLM

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

#: All of the vocabulary but one token, so that the others as one are that token alone, and what is
#: compared is the whole distribution.
TOP_K = 399

OBJECTIVES: dict[str, dict[str, Any]] = {
    "token_kd": {"objective": {"name": "token_kd", "temperature": 1.0}},
    "chunk_likelihood": {
        "objective": {"name": "chunk_likelihood", "merge": False, "debias": False}
    },
    "policy": {
        "objective": {"name": "policy", "single_step": False},
        "samples": {"from": "student", "share": 1.0, "max_new_tokens": 12},
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    folder = tmp_path_factory.mktemp("served")
    tiny.save_pair(folder, same_vocabulary=True, hidden_sizes=(32, 128))  # vLLM wants heads of 32
    server = VLLM.of_teacher(folder / "teacher", folder, gives="logprobs", top_k=TOP_K)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_the_training_of_the_live_teacher(
    server: VLLM, train: Callable[[dict[str, Any]], Any], name: str
):
    folder = server.log.parent
    teacher = {"base_model": str(folder / "teacher"), "dtype": "float32"}
    where = {"url": server.url, "gives": "logprobs", "top_k": TOP_K}
    found, expected = (
        train(
            tiny.base_config(
                folder,
                dskd={"teacher": {**teacher, **served}, **OBJECTIVES[name]},
                output_dir=str(folder / f"{name} {len(served)}"),
                adam_epsilon=1e-6,  # else Adam turns rounding into steps of nearly no gradient
            )
        )[1]
        for served in ({"server": where}, {})
    )
    assert isinstance(teacher_of(found), LogprobTeacher)
    assert len(losses(expected)) == 4
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3, abs=1e-5)
    assert len(set(losses(expected))) > 1
