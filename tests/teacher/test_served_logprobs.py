"""A teacher that is asked for log-probabilities says what the live one would, or why it cannot.

Against a server in this process that can be told to misbehave; a real vLLM is in
tests/training/test_served_training.py. What all served teachers do is in test_served.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from axolotl_dskd import servers
from axolotl_dskd.config import DSKDConfig, TeacherConfig
from axolotl_dskd.data.tokenizers import teacher_position_limit
from axolotl_dskd.teacher import Teacher, TeacherSpec, TrainingRun, load_teacher, open_teacher
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.teacher.served import probe, probe_logprobs
from axolotl_dskd.types import Needs
from tests.support import tiny
from tests.support.batches import batch
from tests.support.rude_server import RudeServer

CPU = torch.device("cpu")
TOP, LABELS = Needs("top"), Needs("labels")
V = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is surer of itself than random ones are."""
    folder = tmp_path_factory.mktemp("served")
    tiny.save_pair(folder)
    model = load_teacher(TeacherConfig(base_model=str(folder / "teacher")), CPU)
    model.lm_head.weight.data *= 4
    model.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[RudeServer]:
    server = RudeServer(str(folder / "teacher"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_LONGEST_WAIT", 0.05)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged (Axolotl's logging lets nothing through to caplog)."""
    lines: list[str] = []
    for module in (probe, probe_logprobs):
        for level in ("info", "warning"):
            monkeypatch.setattr(module.LOG, level, lines.append)
    return lines


def opened(
    folder: Path, url: str | list[str], needs: Needs, rows: list[Any] | None = None, **keys: Any
) -> Teacher:
    where: dict[str, Any] = {"url" if isinstance(url, str) else "urls": url, "gives": "logprobs"}
    where |= {"retries": 2, "timeout": 5, "top_k": 7, **keys}
    block = {"base_model": str(folder / "teacher"), "dtype": "float32", "server": where}
    run = TrainingRun(datasets=lambda: rows or [], needs=needs)
    return open_teacher(TeacherSpec(TeacherConfig.model_validate(block), V, CPU), run)


def log_softmax(folder: Path, rows: Any) -> tuple[Tensor, Tensor]:
    """[M, V] of the live teacher, and the labels."""
    model = load_teacher(TeacherConfig(base_model=str(folder / "teacher"), dtype="float32"), CPU)
    view = LiveTeacher(model, V, CPU)(rows, Needs())
    assert view.head is not None and view.hidden is not None
    return view.head.logits(view.hidden).log_softmax(-1), view.tokens.labels


@pytest.mark.parametrize("lengths", [[12, 7, 30, 9], [5], [12, 12]])
def test_it_says_what_the_live_teacher_would(folder: Path, server: RudeServer, lengths: list[int]):
    rows = batch(lengths)
    expected, labels = log_softmax(folder, rows)
    top = expected.topk(7)
    for needs in (TOP, LABELS):
        found = opened(folder, server.url, needs)(rows, needs)
        assert found.head is None
        assert found.hidden is None
        assert torch.equal(found.tokens.labels, labels)
        logprobs = found.logprobs
        assert logprobs is not None
        torch.testing.assert_close(
            logprobs.labels, expected.gather(-1, labels[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        if needs is LABELS:
            assert logprobs.ids is None
            continue
        assert logprobs.top is not None
        torch.testing.assert_close(logprobs.top, top.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(logprobs.ids, top.indices)


def test_nothing_of_the_teacher_but_its_tokenizer_is_needed(tmp_path: Path, said: list[str]):
    tiny.save_pair(tmp_path)
    server = RudeServer(str(tmp_path / "teacher"))
    for weights in tmp_path.glob("teacher/*.safetensors"):
        weights.unlink()
    teacher = opened(tmp_path, server.url, TOP)
    assert teacher.head is None
    assert teacher.embedding is None
    assert any("The teacher's weights are not here" in line for line in said)
    view = teacher.nothing(teacher(batch([9]), TOP).tokens.at(slice(0)))  # type: ignore[arg-type]
    assert view.logprobs is not None
    assert view.logprobs.labels.shape == (0,)
    assert view.logprobs.top is not None
    assert view.logprobs.top.shape == (0, 7)
    server.close()


def test_ids_that_no_tokenizer_emits_are_among_the_others(folder: Path, server: RudeServer):
    rows = batch([12])
    log_p, _ = log_softmax(folder, rows)
    where = {"url": server.url, "gives": "logprobs", "top_k": 7}
    block = {"base_model": str(folder / "teacher"), "server": where}
    size = int(log_p.argmax(-1).max())  # the first choice of a position is padding
    spec = TeacherSpec(TeacherConfig.model_validate(block), size, CPU)
    logprobs = open_teacher(spec, TrainingRun(needs=TOP))(rows, TOP).logprobs
    assert logprobs is not None and logprobs.ids is not None and logprobs.top is not None
    top, ids = log_p.topk(7)
    assert (ids >= size).any()
    for k in range(len(ids)):
        known = ids[k] < size
        count = int(known.sum())
        assert logprobs.ids[k].tolist() == [*ids[k][known].tolist(), *[-1] * (7 - count)]
        torch.testing.assert_close(logprobs.top[k, :count], top[k][known], rtol=1e-4, atol=1e-4)
        assert (logprobs.top[k, count:] == -torch.inf).all()


# ---- answers of no use -----------------------------------------------------------------------

Edit = Callable[[list[Any]], Any]


def edited(edit: Edit) -> Callable[[Any, Any], None]:
    """The answer, with its entries changed."""

    def mood(handler: Any, answer: Any) -> None:
        content = json.loads(answer[0])
        edit(content["choices"][0]["prompt_logprobs"])
        handler.answer(json.dumps(content).encode(), headers=answer[1])

    return mood


def in_entry(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Any, Any], None]:
    return edited(lambda entries: edit(entries[-1]))


def label_says(value: Any) -> Callable[[Any, Any], None]:
    return in_entry(lambda entry: entry[next(iter(entry))].update(logprob=value))


def html(handler: Any, answer: Any) -> None:
    handler.answer(b"<html>hello</html>", headers={"content-type": "text/html"})


def endless(handler: Any, answer: Any) -> None:
    handler.answer(b"[" * 200_000, headers=answer[1])


MOODS: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "html": (html, r"gives no log-probabilities \(text/html\): is it vLLM"),
    "endless": (endless, r"more than the [\d,]+ bytes"),
    "too few positions": (edited(lambda e: e.pop()), r"of 11 positions, not of 12"),
    "no entries": (edited(lambda e: e.__setitem__(-1, None)), r"gives no log-probabilities"),
    "other tokens": (in_entry(lambda e: e.pop(next(iter(e)))), r"of other tokens than those"),
    "too few tokens": (in_entry(lambda e: [e.popitem() for _ in range(3)]), r"at a position, not"),
    "nan": (label_says(float("nan")), r"that are none"),
    "positive": (label_says(3.5), r"that are none.*--logprobs-mode raw_logprobs"),
    "words": (label_says("much"), r"gives no log-probabilities"),
    "a probability of 0": (label_says(-9999.0), r"of 0 as the probability of a token"),
    "more than 1": (label_says(0.0), r"add up to more than 1"),
}


@pytest.mark.parametrize("name", MOODS)
def test_an_answer_of_no_use_ends_in_words(folder: Path, server: RudeServer, name: str):
    mood, words = MOODS[name]
    teacher = opened(folder, server.url, TOP)
    server.misbehave.append(mood)
    with pytest.raises(ValueError, match=words):
        teacher(batch([12]), TOP)


# ---- the probe -------------------------------------------------------------------------------


def scaled(log_p: Tensor) -> Tensor:
    """At another temperature."""
    return (log_p / 4).log_softmax(-1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p - p.mean(-1, keepdim=True), r"that are none.*--logprobs-mode raw_logprobs"),
        (lambda p: p - 2, r"cut or scaled. Start it with --logprobs-mode raw_logprobs"),
        (lambda p: p.where(p > -6, -torch.inf), r"probability of a token that is there"),
        (scaled, r"weights in .* at temperature 1: the server has another model"),
        (lambda p: p.roll(1, 1), r"the server has another model under this name"),
        (lambda p: p.roll(len(p) // 2, 0), r"does not read causally"),
    ],
    ids=["logits", "no sum of 1", "cut", "temperature", "another model", "not causal"],
)
def test_what_is_no_log_probability_of_the_teacher_is_refused(
    folder: Path, server: RudeServer, change: Callable[[Tensor], Tensor], words: str
):
    server.change = change
    with pytest.raises(ValueError, match=words):
        opened(folder, server.url, TOP)


def test_a_limit_that_is_too_low_is_refused_with_the_flag(folder: Path, server: RudeServer):
    server.max_logprobs = 5
    opened(folder, server.url, LABELS)  # needs none of them
    with pytest.raises(ValueError, match=r"too many logprobs\n.*--max-logprobs 7 and without"):
        opened(folder, server.url, TOP)
    with pytest.raises(ValueError, match=r"top_k is 600, but the teacher has 600 tokens"):
        opened(folder, server.url, TOP, top_k=600)


def test_the_longest_row_must_leave_room_for_a_token(folder: Path, server: RudeServer):
    rows = [
        Dataset.from_dict({"teacher_input_ids": [[1] * n], "teacher_labels": [[1] * n]})
        for n in (512, 511)
    ]
    words = r"the longest row has 512.*--max-model-len 513.*sequence_len: 511"
    with pytest.raises(ValueError, match=words):
        opened(folder, server.url, LABELS, rows=rows[:1])
    opened(folder, server.url, LABELS, rows=rows[1:])
    block: dict[str, Any] = {"base_model": str(folder / "teacher")}
    assert teacher_position_limit(DSKDConfig.model_validate({"teacher": block})) == 512
    block["server"] = {"url": server.url, "gives": "logprobs"}
    assert teacher_position_limit(DSKDConfig.model_validate({"teacher": block})) == 511


def test_servers_of_unlike_teachers_are_refused(folder: Path, server: RudeServer):
    other = RudeServer(str(folder / "teacher"))
    other.change = lambda log_p: log_p.flip(1)
    with pytest.raises(ValueError, match=r"they do not serve the same teacher"):
        opened(folder, [server.url, other.url], LABELS)
    other.close()


def test_what_is_served_is_compared_with_the_local_weights(
    folder: Path, server: RudeServer, said: list[str]
):
    opened(folder, server.url, LABELS)
    assert any("log-probabilities of labels differ by" in line for line in said)
