"""What is said of written answers."""

from __future__ import annotations

import pytest

from tests.support.ranks import launch


@pytest.mark.slow
def test_ranks_that_write_at_once_have_one_speed_together():
    ranks = [
        {"answers": 3, "tokens": 60, "seconds": 2.0, "rows": 4, "written": 3},
        {"answers": 1, "tokens": 20, "seconds": 2.0, "rows": 4, "written": 1},
    ]
    (both,) = launch(2, [{"do": "tally", "ranks": ranks}])
    for said in both:
        assert said["dskd/written_tokens_per_second"] == pytest.approx(40.0)
        assert said["dskd/answer_tokens"] == pytest.approx(20.0)
        assert said["dskd/written_rows"] == pytest.approx(0.5)
