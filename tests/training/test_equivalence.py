"""Ways to train that are one training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.equivalence import BASE, assert_same_training, save_pair, train_variants


@pytest.mark.parametrize("one_vocabulary", [False, True], ids=["two tokenizers", "one vocabulary"])
def test_packed_rows_train_as_padded_ones(tmp_path: Path, one_vocabulary: bool):
    folder = save_pair(tmp_path, one_vocabulary=one_vocabulary)
    trainings = train_variants(folder, {}, ["packed"])
    losses = trainings[BASE].losses
    assert losses[-1] < losses[0]
    assert_same_training(trainings[BASE], trainings["packed"])
