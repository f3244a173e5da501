"""A served teacher gives what the live one gives, or says in words why not.

Against a server in this process that can be told to misbehave; a real vLLM is in
tests/training/test_served_training.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from axolotl_dskd import servers
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.teacher import Teacher, TeacherSpec, TrainingRun, open_teacher
from axolotl_dskd.teacher.served import probe, probe_states
from axolotl_dskd.teacher.served.ends import end_files, load_ends, local_weights
from axolotl_dskd.teacher.served.teacher import ServedTeacher
from axolotl_dskd.types import Needs
from tests.support import tiny
from tests.support.batches import batch
from tests.support.families import CONFIGS, build
from tests.support.rude_server import RudeServer
from tests.support.vllm import free_port

CPU = torch.device("cpu")
NEEDS = Needs(embeddings=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny.save_pair(folder)
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
    for module in (servers, probe, probe_states):
        for level in ("info", "warning"):
            monkeypatch.setattr(module.LOG, level, lines.append)
    return lines


def opened(folder: Path, url: str | list[str] | None, **keys: Any) -> Teacher:
    """The teacher of the folder, served where there is an address."""
    block: dict[str, Any] = {"base_model": str(folder / "teacher"), "dtype": "float32"}
    run = keys.pop("run", TrainingRun())
    block["dtype"] = keys.pop("dtype", "float32")
    if url is not None:
        where = {"url": url} if isinstance(url, str) else {"urls": url}
        block["server"] = {**where, "retries": 2, "timeout": 5, **keys}
    return open_teacher(TeacherSpec(TeacherConfig.model_validate(block), 600, CPU), run)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_it_gives_what_the_live_teacher_gives(
    folder: Path, server: RudeServer, dtype: str, tolerance: float
):
    live, served = opened(folder, None, dtype=dtype), opened(folder, server.url, dtype=dtype)
    for lengths in ([12, 7, 30, 9], [5], [12, 12]):
        found, expected = served(batch(lengths), NEEDS), live(batch(lengths), NEEDS)
        assert found.hidden.dtype == expected.hidden.dtype
        error = (found.hidden - expected.hidden).norm() / expected.hidden.norm()
        assert float(error) < tolerance
        assert torch.equal(found.tokens.labels, expected.tokens.labels)
        assert torch.equal(found.head.weight, expected.head.weight)
        for ours, theirs in zip(found.embedded, expected.embedded, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "opt_projected"])
def test_the_ends_are_the_models_without_its_layers(name: str, tmp_path: Path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    config = TeacherConfig(base_model=str(tmp_path))
    ends = load_ends(config, torch.float32, CPU)
    assert len({p.data_ptr() for p in ends.parameters()}) < len(list(model.parameters()))
    ids, hidden = torch.arange(97), torch.randn(5, model.config.hidden_size)
    assert torch.equal(ends.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
    assert torch.equal(output_head(ends).logits(hidden), output_head(model).logits(hidden))
    shards = list(tmp_path.glob("*.safetensors"))
    assert local_weights(config) == sum(path.stat().st_size for path in shards)
    for path in set(shards) - set(end_files(config)):  # those of the layers are not needed
        path.unlink()
    assert local_weights(config) is None or name == "gpt2_tied"
    load_ends(config, torch.float32, CPU)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path):
    build("llama").model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold lm_head\.weight"):
        load_ends(TeacherConfig(base_model=str(tmp_path)), torch.float32, CPU)
    with pytest.raises(ValueError, match=r"embedding and head of the teacher .* cannot be read"):
        load_ends(TeacherConfig(base_model=str(tmp_path / "no")), torch.float32, CPU)


def test_what_is_expected_is_asked_for_at_once_and_only_once(folder: Path, server: RudeServer):
    served = opened(folder, server.url, concurrency=3)
    assert isinstance(served, ServedTeacher)
    batches = [batch([12, 7, 30]), batch([9, 8, 15, 6])]
    expected = [opened(folder, None)(rows, NEEDS).hidden for rows in batches]
    server.delay, server.most_at_once = 0.1, 0
    before = len(server.requests)
    served.expect(batches)
    time.sleep(1.0)  # the student's forward
    server.delay = 5.0  # later requests would show
    for rows, hidden in zip(batches, expected, strict=True):
        torch.testing.assert_close(served(rows, NEEDS).hidden, hidden, rtol=1e-4, atol=1e-4)
    assert len(server.requests) - before == 7
    assert server.most_at_once == 3  # bounded
    assert not len(served.ahead)


def test_what_was_expected_and_never_came_is_forgotten(folder: Path, server: RudeServer):
    served = opened(folder, server.url)
    assert isinstance(served, ServedTeacher)
    served.expect([batch([12, 7])])
    served.expect([batch([9])])
    assert len(served.ahead) == 1
    served.end()
    assert served(batch([12, 7]), NEEDS).hidden.shape == (10, 48)  # another call asks again


def slow(handler: Any, answer: Any) -> None:
    time.sleep(1.5)
    handler.answer(answer[0], headers=answer[1])


def truncated(handler: Any, answer: Any) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(answer[0])))
    handler.send_header("metadata", answer[1]["metadata"])
    handler.end_headers()
    handler.wfile.write(answer[0][:-7])
    handler.close_connection = True


def hung_up(handler: Any, answer: Any) -> None:
    handler.close_connection = True


def overloaded(handler: Any, answer: Any) -> None:
    handler.answer(b"too many", 429, {"retry-after": "1"})


def broken(handler: Any, answer: Any) -> None:
    handler.answer(b"oops", 500)


@pytest.mark.parametrize("mood", [slow, truncated, hung_up, overloaded, broken])
def test_a_failure_that_passes_is_asked_again(folder: Path, server: RudeServer, mood: Any):
    served = opened(folder, server.url, timeout=1.0)
    expected = opened(folder, None)(batch([12, 7]), NEEDS).hidden
    server.misbehave += [mood, mood]
    began = time.monotonic()
    found = served(batch([12, 7]), NEEDS).hidden
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not server.misbehave
    if mood is overloaded:
        assert time.monotonic() - began > 0.9  # as long as it had asked for


def test_a_failure_that_stays_ends_with_where_to_resume_and_without_the_key(
    folder: Path, server: RudeServer, monkeypatch: pytest.MonkeyPatch, said: list[str]
):
    monkeypatch.setenv("TEACHER_KEY", "sesame-4711")
    run = TrainingRun(how_to_resume=lambda: "Then go on with out/checkpoint-40")
    served = opened(folder, server.url, run=run, api_key_env="TEACHER_KEY")
    assert server.requests[-1]["Authorization"] == "Bearer sesame-4711"
    server.misbehave += [broken] * 3
    with pytest.raises(ValueError) as error:
        served(batch([12]), NEEDS)
    text = str(error.value)
    assert "gave no answer in 3 tries" in text
    assert "500 Internal Server Error: oops" in text
    assert text.endswith("Then go on with out/checkpoint-40")
    assert "sesame" not in text + "".join(said)
    asked = len(server.requests)
    with pytest.raises(ValueError, match="gave no answer"):  # a step's other micro-batches
        served(batch([13]), NEEDS)
    assert len(server.requests) == asked


def html(handler: Any, answer: Any) -> None:
    handler.answer(b"<html>hello</html>", headers={"content-type": "text/html"})


def endless(handler: Any, answer: Any) -> None:
    handler.answer(b"a" * 200_000, headers=answer[1])


def short(handler: Any, answer: Any) -> None:
    handler.answer(answer[0][:-4], headers=answer[1])


def bad_shape(handler: Any, answer: Any) -> None:
    handler.answer(answer[0], headers={"metadata": answer[1]["metadata"].replace("48", "64")})


def nonsense(handler: Any, answer: Any) -> None:
    handler.answer(answer[0], headers={"metadata": "(1, 2"})


def nan(handler: Any, answer: Any) -> None:
    content = torch.frombuffer(bytearray(answer[0]), dtype=torch.float32)
    content[5] = float("nan")
    handler.answer(content.numpy().tobytes(), headers=answer[1])


def forbidden(handler: Any, answer: Any) -> None:
    handler.answer(b"no \x1b[31mkey", 401)


def elsewhere(handler: Any, answer: Any) -> None:
    handler.answer(b"", 307, {"location": "http://127.0.0.1:9/"})


WORDS = {
    html: r"answers with text/html, not with float32 numbers of shape \[11, 48\]",
    endless: r"more than the 65,536 bytes",
    short: r"announces .* 2,112 bytes, and gives 2,108",
    bad_shape: r"numbers of shape \[11, 64\], not with float32 numbers of shape \[11, 48\]",
    nonsense: r"describes its answer as '\(1, 2'",
    nan: r"states that are not finite for the text whose ids begin with",
    forbidden: r"401 Unauthorized: no  \[31mkey\nIt wants a key: .* api_key_env",
    elsewhere: r"307 Temporary Redirect",
}


@pytest.mark.parametrize("mood", WORDS)
def test_an_answer_of_no_use_ends_in_words(folder: Path, server: RudeServer, mood: Any):
    served = opened(folder, server.url)
    server.misbehave.append(mood)
    with pytest.raises(ValueError, match=WORDS[mood]):
        served(batch([12]), NEEDS)


def test_several_servers_share_the_load_and_one_may_be_away(folder: Path, said: list[str]):
    both = [RudeServer(str(folder / "teacher")) for _ in range(2)]
    served = opened(folder, [server.url for server in both])
    before = [len(server.requests) for server in both]
    for server in both:
        server.delay = 0.05
    served(batch([12, 7, 30, 9, 8, 11]), NEEDS)
    counts = [len(server.requests) - n for server, n in zip(both, before, strict=True)]
    assert counts == [3, 3]
    both[0].close()
    expected = opened(folder, None)(batch([15, 9]), NEEDS).hidden
    found = served(batch([15, 9]), NEEDS).hidden
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    both[1].close()


# ---- the probe -------------------------------------------------------------------------------


def test_what_is_served_is_compared_with_the_local_weights(
    folder: Path, server: RudeServer, said: list[str]
):
    opened(folder, server.url)
    assert any("against the local weights: states differ by" in line for line in said)


def test_weights_that_are_quantised_here_are_not_compared(
    folder: Path, server: RudeServer, said: list[str], tmp_path: Path
):
    """A GPTQ or AWQ checkpoint: what runs it may not be installed."""
    copied = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", copied)
    described = json.loads((copied / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(described))
    opened(tmp_path, server.url, model=str(folder / "teacher"))
    assert any("weights are quantised: what is served is not compared" in line for line in said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s / s.norm(dim=1, keepdim=True), r"They have length 1: it normalises them"),
        (lambda s: 3 * s, r"% off from values of the final norm"),
        (lambda s: s.flip(0), r"other states for the beginning of a text once the text goes on"),
        (lambda s: s.roll(1, 1), r"the server has another model under this name"),
        (lambda s: s[:1], r"numbers of shape \[1, 48\]"),
    ],
    ids=["normalised", "scaled", "not causal", "another model", "one state a text"],
)
def test_states_that_the_head_does_not_take_are_refused(
    folder: Path, server: RudeServer, change: Any, words: str
):
    server.change = change
    with pytest.raises(ValueError, match=words):
        opened(folder, server.url)


def test_another_name_tokenizer_or_context_is_refused(folder: Path, server: RudeServer):
    with pytest.raises(ValueError, match=r"serves .*teacher, not llama.*set `model`"):
        opened(folder, server.url, model="llama")
    rows = Dataset.from_dict({"teacher_input_ids": [[1] * 600], "teacher_labels": [[1] * 600]})
    with pytest.raises(ValueError, match=r"reads 512 tokens at most.*has 600.*--max-model-len 600"):
        opened(folder, server.url, run=TrainingRun(datasets=lambda: [rows]))
    server.tokenizer = tiny.byte_level_tokenizer()
    with pytest.raises(ValueError, match=r"has another tokenizer than .*teacher has here"):
        opened(folder, server.url)


def test_a_server_for_short_rows_is_tried_with_a_short_text(folder: Path, server: RudeServer):
    server.max_model_len = 64
    served = opened(folder, server.url)
    with pytest.raises(ValueError, match=r"refuses the request: 400 Bad Request: too long"):
        served(batch([70]), NEEDS)


def test_servers_of_unlike_teachers_are_refused(folder: Path):
    both = [RudeServer(str(folder / "teacher")) for _ in range(2)]
    both[1].change = lambda states: states.flip(1)
    with pytest.raises(ValueError, match=r"they do not serve the same teacher"):
        opened(folder, [server.url for server in both])
    for server in both:
        server.close()


def test_no_server_at_all_is_said(folder: Path):
    with pytest.raises(ValueError, match=r"gave no answer in 3 tries"):
        opened(folder, f"http://127.0.0.1:{free_port()}")


# ---- behind a cache --------------------------------------------------------------------------


def test_a_cache_keeps_what_was_served(folder: Path, server: RudeServer, tmp_path: Path):
    rows = batch([12, 7])
    keys = ("teacher_input_ids", "teacher_labels")
    lengths = rows.teacher_attention_mask.sum(1).tolist()
    columns = {
        key: [row[:n].tolist() for row, n in zip(getattr(rows, key), lengths, strict=True)]
        for key in keys
    }
    block = {
        "base_model": str(folder / "teacher"),
        "dtype": "float32",
        "server": {"url": server.url},
        "cache": {"path": str(tmp_path), "dtype": "float32"},
    }
    spec = TeacherSpec(TeacherConfig.model_validate(block), 600, CPU)
    expected = opened(folder, None)(rows, NEEDS)
    for already in (False, True):
        teacher = open_teacher(spec, TrainingRun(datasets=lambda: [Dataset.from_dict(columns)]))
        before = len(server.requests)
        teacher.begin()
        teacher.expect([rows])
        found = teacher(rows, NEEDS)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.embedded[0], expected.embedded[0])
        assert len(server.requests) - before == (0 if already else 2)
        teacher.end_epoch(more=True)
        teacher.end()
    server.close()
    open_teacher(spec, TrainingRun())  # the server is not needed any more
