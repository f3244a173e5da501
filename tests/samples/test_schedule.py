"""The scheduler and the buffer, by published numbers and by what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.samples.fit import longest_that_fit
from axolotl_dskd.samples.replay import Replay
from axolotl_dskd.samples.schedule import Schedule, Take
from axolotl_dskd.supervision import labels_ahead, supervised_mask
from tests.support.golden_methods import files

ACTIONS = {Take.DATASET: 0, Take.WRITTEN: 1, Take.KEPT: 2}
golden = pytest.mark.parametrize("path", files("distillm-scheduler"), ids=lambda p: p.stem)


def schedule(**keys) -> Schedule:
    return Schedule(StudentSamplesConfig.model_validate({"from": "student", **keys}))


def test_there_are_golden_files():
    assert files("distillm-scheduler")


@golden
def test_the_adaptive_share_moves_as_published(path: Path):
    numbers = np.load(path)
    ours = schedule(
        share="adaptive",
        adaptive_start=float(numbers["initial_threshold"]),
        adaptive_margin=float(numbers["loss_eps"]),
    )
    ours.evaluated(float(numbers["initial_val_loss"]), 0)
    for k, loss in enumerate(numbers["val_losses"].tolist(), 1):
        ours.evaluated(loss, k)
        assert ours.share == pytest.approx(float(numbers["thresholds"][k - 1]), abs=1e-12)
        assert ours.reference == float(numbers["reference_losses"][k - 1])


@pytest.mark.parametrize("mode", ["decreasing", "increasing", "constant"])
@golden
def test_what_a_step_takes_and_what_the_buffer_holds_are_as_published(path: Path, mode: str):
    numbers = np.load(path)
    ours = schedule(share=float(numbers["decision_threshold"]), replay_schedule=mode)
    buffer, batch, total = (
        Replay(int(numbers["capacity"])),
        int(numbers["batch_size"]),
        int(numbers["total_iters"]),
    )
    for k, draw in enumerate(numbers["draws"].tolist()):
        expected = float(numbers[f"fresh_threshold_{mode}"][k])
        assert ours.fresh(k + 1, total) == pytest.approx(expected, abs=1e-12)
        take = ours.take(draw, k + 1, total, full=buffer.is_full)
        assert ACTIONS[take] == int(numbers[f"actions_{mode}"][k])
        if take is Take.WRITTEN:
            buffer.add([{"input_ids": [k]}] * batch)
        assert len(buffer) == int(numbers[f"buffer_len_{mode}"][k])


def test_without_a_rise_nothing_is_written_and_of_one_step_one_evaluation_counts():
    ours = schedule(share="adaptive")
    ours.evaluated(2.0, 0)
    assert ours.take(0.0, 1, 10, full=False) is Take.DATASET
    ours.evaluated(2.05, 5)
    ours.evaluated(9.0, 5)  # another evaluation set
    assert ours.share == 0.0
    ours.evaluated(2.1, 6)
    assert (ours.share, ours.reference) == (0.1, 2.1)


def test_the_draw_of_a_step_does_not_depend_on_those_before():
    ours, other = schedule(), schedule()
    first = [ours.draw(k) for k in range(50)]
    assert [other.draw(k) for k in (7, 3, 49)] == [first[k] for k in (7, 3, 49)]
    assert len(set(first)) == 50
    assert 0.3 < sum(draw < 0.5 for draw in first) / 50 < 0.7
    assert [schedule(seed=1).draw(k) for k in range(50)] != first


def test_a_share_that_is_given_does_not_move_and_a_state_brings_one_back_that_does():
    fixed = schedule(share=0.3)
    fixed.evaluated(1.0, 0)
    fixed.evaluated(9.0, 1)
    assert fixed.share == 0.3
    ours, resumed = schedule(share="adaptive"), schedule(share="adaptive")
    for step, loss in enumerate((1.0, 1.2, 1.5)):
        ours.evaluated(loss, step)
    resumed.restore(ours.state())
    for step, loss in enumerate((1.5, 1.55, 2.0), 2):
        ours.evaluated(loss, step)
        resumed.evaluated(loss, step)
    assert resumed.state() == ours.state()


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"input_ids": list(range(k % 5 + 1)), "labels": [-100, k], "dskd_logprobs": bytes([k] * 4)}
        for k in range(start, start + count)
    ]


def test_the_oldest_rows_leave_first_and_none_are_kept_where_none_are_to_be():
    buffer = Replay(5)
    buffer.add(rows(3))
    assert not buffer.is_full
    buffer.add(rows(4, 3))
    assert buffer.is_full
    assert list(buffer.rows) == rows(5, 2)
    nothing = Replay(0)
    nothing.add(rows(2))
    assert not len(nothing)
    assert not nothing.is_full


def test_rows_are_drawn_without_repetition_and_by_the_seed():
    buffer = Replay(20)
    buffer.add(rows(20))
    drawn = buffer.drawn(20, 1, 2)
    assert sorted(map(str, drawn)) == sorted(map(str, rows(20)))
    assert buffer.drawn(8, 1, 2) == drawn[:8]  # more ranks, the same rows
    assert buffer.drawn(20, 1, 3) != drawn


def test_which_rows_are_drawn_does_not_follow_from_what_has_chosen_the_step():
    """By the same random numbers the row that is drawn last would lie at twice the draw."""
    buffer, ours = Replay(16), schedule(seed=7)
    buffer.add([{"row": k} for k in range(16)])
    low = [(step, draw) for step in range(400) if (draw := ours.draw(step)) < 0.5]
    last = [buffer.drawn(16, 7, step)[-1]["row"] == int(32 * draw) for step, draw in low]
    assert sum(last) < 0.25 * len(last)


def test_a_buffer_comes_back_from_its_file(tmp_path: Path):
    buffer, other = Replay(9), Replay(9)
    buffer.add(rows(12))
    buffer.save(tmp_path / "replay.safetensors")
    other.load(tmp_path / "replay.safetensors")
    assert other.rows == buffer.rows
    some = rows(6)
    some[1]["dskd_weights"] = bytes([7] * 4)
    buffer.add(some)
    buffer.save(tmp_path / "some.safetensors")
    other.load(tmp_path / "some.safetensors")
    assert list(other.rows)[3:] == some
    empty = Replay(3)
    empty.save(tmp_path / "empty.safetensors")
    other.load(tmp_path / "empty.safetensors")
    assert not len(other)


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 40])
def test_a_missing_or_damaged_file_is_refused_in_words(tmp_path: Path, content: bytes | None):
    path = tmp_path / "replay.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="kept answers"):
        Replay(3).load(path)


@pytest.mark.parametrize(
    ("lengths", "room", "longest"),
    [
        ([3, 5], 8, 5),
        ([3, 5], 7, 4),
        ([3, 5], 5, 2),
        ([9, 9, 1], 11, 5),
        ([4], 0, 0),
        ([4], -3, -3),
        ([], 5, 0),
    ],
)
def test_answers_are_cut_as_little_as_fits(lengths: list[int], room: int, longest: int):
    assert longest_that_fit(lengths, room) == longest
    assert longest <= 0 or sum(min(n, longest) for n in lengths) <= room


@pytest.mark.parametrize("path", files("distillm-sgo"), ids=lambda p: p.stem)
def test_written_answers_are_supervised_from_their_first_token_to_their_end(path: Path):
    """As DistiLLM's batches should be (its own are a position late): the padding token, which is
    its end token, is supervised where the student wrote it."""
    numbers = np.load(path)
    end = int(numbers["pad_id"])
    rows = []
    for prompt, mask, sequence in zip(
        numbers["prompt_ids"], numbers["prompt_mask"], numbers["sequences"], strict=True
    ):
        said = sequence[len(prompt) :].tolist()
        said = said[: said.index(end) + 1] if end in said else said
        rows.append((prompt[mask == 1].tolist(), said))
    labels = [torch.tensor([-100] * len(prompt) + said) for prompt, said in rows]
    segments = [torch.full_like(row, k) for k, row in enumerate(labels)]
    width = numbers["labels_correct"].shape[1]
    padded, numbered = (
        torch.stack([torch.nn.functional.pad(x, (0, width - len(x)), value=v) for x in rows_])
        for rows_, v in ((labels, -100), (segments, -1))
    )
    expected = torch.from_numpy(numbers["labels_correct"])
    found = torch.where(supervised_mask(padded, numbered), labels_ahead(padded), -100)
    assert torch.equal(found, expected)
