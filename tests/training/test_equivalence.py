"""Ways to train that are one training, with every objective.

One padded training of each is what its other ways are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from safetensors.torch import load_file

from tests.support.equivalence import BASE, SAVED, Training, assert_same_training, training_config
from tests.support.ranks import launch, run
from tests.support.trained_objectives import CASES, TOY, Trained, train_once

pytestmark = pytest.mark.slow

#: Logged whatever the objective.
ALWAYS = {"supervised_tokens", "bits_per_byte"}
#: Ways that differ in kind: how a batch is cut, ranks, checkpoints, and where states come from.
IN_KIND = ("packed", "two ranks", "resumed", "cached")
WAYS = dict.fromkeys(CASES, IN_KIND) | {
    "default, one vocabulary": ("packed",),
    "chunk_likelihood": (*IN_KIND, "1x8", "reversed"),
}


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Trained]:
    """The trainings of a case, all made once."""
    return train_once(request, tmp_path_factory, WAYS.__getitem__)


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, way, id=f"{name}-{way}") for name, ways in WAYS.items() for way in ways],
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
        assert step.keys() == {f"dskd/{term}" for term in {*case.terms, *ALWAYS}}
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
