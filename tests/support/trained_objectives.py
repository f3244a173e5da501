"""Every objective as it is trained in tests: its keys, and what a training of it must say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.equivalence import Asked, Training, save_pair, train_all

TOY = "tests.support.toy_objective"


@dataclass(frozen=True)
class Case:
    """A `dskd:` block and what is known of its trainings.

    Attributes:
        block: without its teacher.
        terms: what is logged at every step, beside the count of supervised tokens.
        one_vocabulary: both sides have one tokenizer.
        has_module: something is trained beside the student.
    """

    block: dict[str, Any]
    terms: set[str]
    one_vocabulary: bool = False
    has_module: bool = False

    @property
    def name(self) -> str:
        """The objective's."""
        return self.block.get("objective", {}).get("name", "dual_space")


def objective(name: str, *terms: str, **keys: Any) -> Case:
    """An objective by its name, with its own terms beside those that all of ours have."""
    return Case({"objective": {"name": name}}, {"ce", "aligned", *terms}, **keys)


DUAL_SPACE = {
    "ce",
    "student_space",
    "projector_ce",
    "teacher_space",
    "projector_accuracy",
    "teacher_nll",
    "projected_nll",
    "teacher_accuracy",
    "aligned",
}

CASES = {
    "default, two tokenizers": Case({}, DUAL_SPACE, has_module=True),
    "default, one vocabulary": Case({}, DUAL_SPACE, has_module=True, one_vocabulary=True),
    "token_kd": objective("token_kd", "kd", "teacher_accuracy", one_vocabulary=True),
    "uld": objective("uld", "uld", "uld_left_out"),
    "chunk_likelihood": objective("chunk_likelihood", "chunk", "tokens_per_chunk", "chunks"),
    "gold": objective("gold", "shared", "by_rank"),
    "min_edit": objective("min_edit", "min_edit", "translated"),
    "sinkhorn": objective(
        "sinkhorn", "kl", "sinkhorn", "plan_diagonal", "teacher_accuracy", one_vocabulary=True
    ),
    "span_support": objective("span_support", "support", "teacher_rest"),
    "virtual attention": Case(
        {"virtual_attention": {"blocks": 4, "anneal": 0.75, "entropy_weight": 0.1}},
        {*DUAL_SPACE, "attention_entropy"},
        has_module=True,
    ),
    "toy": Case({"objective": {"name": TOY}}, {"ce", "distance"}),
}


@dataclass(frozen=True)
class Trained:
    """A case with its trainings by way, and where their outputs are."""

    case: Case
    folder: Path
    trainings: dict[str, Training] = field(default_factory=dict)


def train_once(
    request: pytest.FixtureRequest,
    factory: pytest.TempPathFactory,
    ways: Callable[[str], Iterable[str]],
) -> Callable[[str], Trained]:
    """The trainings of a case in all its ways; those of all cases are made when one is asked for.

    Args:
        request: of a module's fixture: the cases are those that its tests take as `name`.
        ways: of a case's name to keys of `VARIANTS`.
    """

    @cache
    def made() -> dict[str, Trained]:
        tests = [item for item in request.session.items if item.path == request.path]
        parameters = (getattr(item, "callspec", None) for item in tests)
        names = dict.fromkeys(p.params["name"] for p in parameters if p is not None)
        cases = {name: CASES[name] for name in names}
        folders = [
            save_pair(factory.mktemp("case"), one_vocabulary=case.one_vocabulary)
            for case in cases.values()
        ]
        asked = [
            Asked(folder, case.block, [*ways(name)])
            for folder, (name, case) in zip(folders, cases.items(), strict=True)
        ]
        found = zip(cases.items(), folders, train_all(asked), strict=True)
        return {name: Trained(case, *rest) for (name, case), *rest in found}

    return lambda name: made()[name]
