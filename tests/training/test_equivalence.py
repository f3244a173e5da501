"""Ways to train that are one training, with every objective.

One padded training of each is what its other ways are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.equivalence import (
    BASE,
    SAVED,
    Training,
    assert_same_training,
    save_pair,
    train_variants,
    training_config,
)
from tests.support.ranks import launch, run

pytestmark = pytest.mark.slow

TOY = "tests.support.toy_objective"


@dataclass(frozen=True)
class Case:
    """A `dskd:` block and the ways in which it is trained.

    Attributes:
        block: without its teacher.
        ways: keys of `VARIANTS`.
        terms: what is logged at every step, beside the count of supervised tokens.
        one_vocabulary: both sides have one tokenizer.
        has_module: something is trained beside the student.
    """

    block: dict[str, Any]
    ways: tuple[str, ...]
    terms: set[str]
    one_vocabulary: bool = False
    has_module: bool = False

    @property
    def name(self) -> str:
        """The objective's."""
        return self.block.get("objective", {}).get("name", "dual_space")


def objective(name: str, *terms: str, ways: tuple[str, ...] = ("packed",), **keys: Any) -> Case:
    """An objective by its name, with its own terms beside those that all of ours have."""
    return Case({"objective": {"name": name}}, ways, {"ce", "aligned", *terms}, **keys)


DUAL_SPACE = {
    "ce",
    "student_space",
    "projector_ce",
    "teacher_space",
    "projector_accuracy",
    "teacher_accuracy",
    "aligned",
}
#: Ways that differ in kind: how a batch is cut, ranks, checkpoints, and where states come from.
IN_KIND = ("packed", "two ranks", "resumed", "cached")
ALL = (*IN_KIND, "1x8", "reversed")

CASES = {
    "default, two tokenizers": Case({}, IN_KIND, DUAL_SPACE, has_module=True),
    "default, one vocabulary": Case(
        {}, ("packed",), DUAL_SPACE, has_module=True, one_vocabulary=True
    ),
    "token_kd": objective("token_kd", "kd", "teacher_accuracy", ways=IN_KIND, one_vocabulary=True),
    "uld": objective("uld", "uld", "uld_left_out"),
    "chunk_likelihood": objective(
        "chunk_likelihood", "chunk", "tokens_per_chunk", "chunks", ways=ALL
    ),
    "gold": objective("gold", "shared", "by_rank"),
    "min_edit": objective("min_edit", "min_edit", "translated"),
    "sinkhorn": objective(
        "sinkhorn", "kl", "sinkhorn", "plan_diagonal", "teacher_accuracy", one_vocabulary=True
    ),
    "span_support": objective("span_support", "support", "teacher_rest"),
    "toy": Case({"objective": {"name": TOY}}, IN_KIND, {"ce", "distance"}),
}


@dataclass(frozen=True)
class Trained:
    """A case with its trainings by way, and where their outputs are."""

    case: Case
    folder: Path
    trainings: dict[str, Training] = field(default_factory=dict)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The trainings of a case, made once."""

    @cache
    def made(name: str) -> Trained:
        case = CASES[name]
        folder = save_pair(tmp_path_factory.mktemp("case"), one_vocabulary=case.one_vocabulary)
        return Trained(case, folder, train_variants(folder, case.block, case.ways))

    return made


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, id=f"{name}-{way}")
        for name, case in CASES.items()
        for way in case.ways
    ],
)
def test_every_way_to_train_is_the_same_training(
    trained: Callable[[str], Trained], name: str, way: str
):
    trainings = trained(name).trainings
    losses = trainings[BASE].losses
    assert losses[-1] < losses[0]
    assert_same_training(trainings[BASE], trainings[way])


@pytest.mark.parametrize("name", CASES)
def test_every_step_logs_the_terms_of_the_objective(trained: Callable[[str], Trained], name: str):
    case, metrics = trained(name).case, trained(name).trainings[BASE].metrics
    for step in metrics:
        assert step.keys() == {f"dskd/{term}" for term in {*case.terms, "supervised_tokens"}}
        assert step["dskd/ce"] > 0
        if "aligned" in case.terms:
            assert 0 < step["dskd/aligned"] <= 1


@pytest.mark.parametrize("name", CASES)
def test_terms_do_not_depend_on_their_weights(trained: Callable[[str], Trained], name: str):
    """Where the student is still the same, at the first step."""
    case, folder = trained(name).case, trained(name).folder
    block = {**case.block, "kd_ratio": 1.0}
    config = training_config(folder, block, "distilled alone", {"max_steps": 1})
    (result,) = run(1, {"do": "train", "config": config})
    (metrics,) = Training.of(result).metrics
    ours = trained(name).trainings[BASE].metrics[0]
    assert metrics == pytest.approx(ours, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_says_which_objective_wrote_it(trained: Callable[[str], Trained], name: str):
    case, folder = trained(name).case, trained(name).folder
    dskd = folder / BASE / f"checkpoint-{SAVED}" / "dskd"
    assert json.loads((dskd / "objective.json").read_text()) == {"objective": case.name}
    assert bool(load_file(dskd / "module.safetensors")) == case.has_module


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("token_kd", "uld"),
        ("token_kd", "dual_space"),
        ("toy", "chunk_likelihood"),
        ("chunk_likelihood", TOY),
        ("default, two tokenizers", "uld"),
    ],
)
def test_a_checkpoint_of_another_objective_is_refused_in_words(
    trained: Callable[[str], Trained], name: str, other: str
):
    case, folder = trained(name).case, trained(name).folder
    config = training_config(folder, {"objective": {"name": other}}, "resumed")
    config["output_dir"] = str(folder / "of another objective")
    ((result,),) = launch(1, [{"do": "train", "config": config}])
    for text in (str(folder / BASE), f"found {case.name} with", f"need {other} with"):
        assert text in result["error"]
    assert "objective must be those of the interrupted run" in result["error"]
