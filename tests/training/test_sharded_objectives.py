"""Every objective with a sharded student, whose head trains or is frozen, and with a quantised one.

What `test_equivalence` shows of one process and of plain ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.equivalence import VARIANTS, assert_same_training
from tests.support.trained_objectives import CASES, Trained, train_once

pytestmark = pytest.mark.slow

WAYS = ("fsdp2", "zero3", "fsdp2 lora", "zero3 lora", "qlora two ranks")
#: One of dual space's is enough.
NAMES = [name for name in CASES if name != "default, one vocabulary"]


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """The trainings of a case, all made once."""
    return train_once(request, tmp_path_factory, lambda _: WAYS)


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, id=f"{name}-{way}") for name in NAMES for way in WAYS],
)
def test_it_is_the_same_training_as_that_of_a_whole_student(
    trained: Callable[[str], Trained], name: str, way: str
):
    trainings, variant = trained(name).trainings, VARIANTS[way]
    whole = trainings[variant.like]
    assert whole.losses[-1] < whole.losses[0]
    assert_same_training(whole, trainings[way], rel=variant.within, atol=variant.within)
