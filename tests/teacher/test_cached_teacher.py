"""Training from the cache: what the live teacher gives, without its body."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig

from axolotl_dskd.cache import Codec, Damaged, RowStore
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.teacher import TeacherSpec, TrainingRun, live, open_teacher
from axolotl_dskd.teacher.cached.fill import CacheableRows, fill, missing_rows
from axolotl_dskd.teacher.cached.identity import teacher_identity
from axolotl_dskd.teacher.cached.open import open_cache
from axolotl_dskd.teacher.cached.states import Body, CachedStates
from axolotl_dskd.teacher.cached.tables import EmbeddingTable, read_tables, write_tables
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.types import DualBatch, Needs, View
from tests.support import tiny
from tests.support.batches import batch
from tests.support.families import CONFIGS, SMALL, build
from tests.support.runs import losses, teacher_of

Train = Callable[[dict[str, Any]], Any]
CPU = torch.device("cpu")
NEEDS = Needs(embeddings=True)

FAMILIES = {name: config for name, config in CONFIGS.items() if name != "opt_projected"}
FAMILIES["gemma2_scaled_embedding"] = Gemma2Config(**SMALL, head_dim=8)
FAMILIES["gemma3_tied"] = Gemma3TextConfig(**SMALL, head_dim=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_embedding_come_back_bit_by_bit(name: str, dtype: torch.dtype, tmp_path: Path):
    model = build(name, FAMILIES[name]).to(dtype)
    embedding = model.get_input_embeddings()
    head = output_head(model, 97)
    write_tables(tmp_path / "head", head, EmbeddingTable.of(embedding))
    read = read_tables(tmp_path / "head", 90, CPU)
    assert read is not None
    ids, hidden = torch.arange(97), torch.randn(5, 32, dtype=dtype)
    assert torch.equal(read[1](ids), embedding(ids))
    assert torch.equal(read[1].weight, embedding.weight)
    assert torch.equal(read[0].weight, head.weight[:90])
    assert (read[0].bias is None) == (head.bias is None)
    if read[0].bias is not None and head.bias is not None:
        assert torch.equal(read[0].bias, head.bias[:90])
    # A product of another number of columns may round otherwise, by processor.
    torch.testing.assert_close(read[0].logits(hidden), head.logits(hidden)[:, :90])
    assert read[0].vocab_size == 90


def test_a_tied_head_is_stored_once(tmp_path: Path):
    for name in ("llama", "llama_tied"):
        model = build(name, FAMILIES[name])
        table = EmbeddingTable.of(model.get_input_embeddings())
        write_tables(tmp_path / name, output_head(model), table)
    sizes = [(tmp_path / name).stat().st_size for name in ("llama", "llama_tied")]
    assert sizes[0] > 1.9 * sizes[1]


def test_a_damaged_head_is_never_used(tmp_path: Path):
    model = build("llama", FAMILIES["llama"])
    path = tmp_path / "head"
    write_tables(path, output_head(model), EmbeddingTable.of(model.get_input_embeddings()))
    intact = path.read_bytes()
    expected = read_tables(path, 97, CPU)
    assert expected is not None
    generator = np.random.default_rng(0)
    header = range(0, 400)
    for at in [*header, *generator.integers(400, len(intact), 200).tolist()]:
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :])
        try:
            found = read_tables(path, 97, CPU)
        except Damaged as error:
            assert str(path) in str(error)
            continue
        assert found is not None
        assert torch.equal(found[0].weight, expected[0].weight)
    for size in (0, 5, 300, len(intact) - 1):
        path.write_bytes(intact[:size])
        with pytest.raises(Damaged):
            read_tables(path, 97, CPU)


def test_an_embedding_that_does_something_unknown_is_refused():
    class Shifted(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    with pytest.raises(ValueError, match="does something to its rows"):
        EmbeddingTable.of(Shifted(10, 4))


def cached(tmp_path: Path, storage: str, loads: list[int]) -> CachedTeacher:
    def load() -> LiveTeacher:
        loads.append(1)
        return LiveTeacher(tiny.tiny_llama(97, 32, seed=0), 97, CPU)

    first = load()
    loads.clear()
    table = EmbeddingTable.of(first.model.get_input_embeddings())
    codec = Codec(storage, 32)
    store = RowStore(tmp_path, codec.bytes_per_token)
    states = CachedStates(store, codec, first.head, table, Body(load))
    return CachedTeacher(states, TrainingRun())


def collated(teacher: CachedTeacher, plain: DualBatch) -> DualBatch:
    """The batch as the data workers hand it on."""
    lengths = plain.teacher_attention_mask.sum(1).tolist()
    ids = [row[:n] for row, n in zip(plain.teacher_input_ids, lengths, strict=True)]
    labels = [row[:n] for row, n in zip(plain.teacher_labels, lengths, strict=True)]
    states, found = teacher.states.store.read_samples(ids, labels)
    return DualBatch(
        plain.input_ids,
        plain.labels,
        plain.segment_ids,
        plain.teacher_input_ids,
        plain.teacher_labels,
        plain.teacher_attention_mask,
        states,
        found,
    )


@pytest.mark.parametrize(("storage", "error"), [("float32", 0), ("bfloat16", 4e-3), ("int8", 0.01)])
def test_the_signal_is_the_live_teachers_whatever_batch_it_was_cached_from(
    tmp_path: Path, storage: str, error: float
):
    loads: list[int] = []
    teacher = cached(tmp_path, storage, loads)
    body = LiveTeacher(tiny.tiny_llama(97, 32, seed=0), 97, CPU)
    seen = batch([6, 20, 3, 11])
    first = teacher(collated(teacher, seen), NEEDS)  # nothing is there yet
    teacher.end()
    teacher.states.body.free()
    assert len(loads) == 1
    rows = [3, 0, 2, 1]
    other = DualBatch(
        seen.input_ids,
        seen.labels,
        seen.segment_ids,
        torch.nn.functional.pad(seen.teacher_input_ids, (0, 9))[rows],
        torch.nn.functional.pad(seen.teacher_labels, (0, 9), value=-100)[rows],
        torch.nn.functional.pad(seen.teacher_attention_mask, (0, 9))[rows],
    )
    for now, again in ((seen, first), (other, None)):
        found, expected = teacher(collated(teacher, now), NEEDS), body(now, NEEDS)
        if again is not None:
            assert torch.equal(found.hidden, again.hidden)  # computed and read are the same
        difference = (found.hidden - expected.hidden).norm() / expected.hidden.norm()
        assert float(difference) <= error + 1e-6
        assert torch.equal(found.tokens.labels, expected.tokens.labels)
        assert torch.equal(found.tokens.sample_ids, expected.tokens.sample_ids)
        for ours, theirs in zip(found.embedded, expected.embedded, strict=True):
            assert torch.equal(ours, theirs)
    assert len(loads) == 1


def test_only_what_is_missing_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[int] = []
    teacher = cached(tmp_path, "float32", loads)
    teacher(collated(teacher, batch([6, 20])), NEEDS)
    rows_run: list[int] = []
    run = live.LiveTeacher.states

    def counted(self: LiveTeacher, now: DualBatch) -> Any:
        rows_run.append(len(now.teacher_labels))
        return run(self, now)

    monkeypatch.setattr(live.LiveTeacher, "states", counted)
    teacher(collated(teacher, batch([6, 20, 9, 4])), NEEDS)
    teacher(batch([6, 20, 9, 4]), NEEDS)  # found by the process itself, though no worker looked
    assert rows_run == [2]


def test_states_that_are_not_finite_are_refused_not_cached(tmp_path: Path):
    teacher = cached(tmp_path, "int8", [])
    with torch.no_grad():
        teacher.states.body.get().embedding[5] = float("nan")
    seen = batch([8])
    seen.teacher_input_ids[0, 0] = 5
    with pytest.raises(ValueError, match=r"not finite for the sample.*begin with \[5,"):
        teacher(collated(teacher, seen), NEEDS)


def test_where_memory_runs_out_samples_are_computed_in_smaller_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = CacheableRows([teacher_sides([20, 18, 16, 14, 12, 10])])
    states = cached(tmp_path, "float32", []).states
    run, most = live.LiveTeacher.states, [40]

    def small(self: LiveTeacher, now: DualBatch) -> Any:
        if now.teacher_input_ids.numel() > most[0]:
            raise torch.OutOfMemoryError
        return run(self, now)

    monkeypatch.setattr(live.LiveTeacher, "states", small)
    fill(states, rows, missing_rows(states, rows))
    assert not len(missing_rows(states, rows))
    assert states.body.get().max_tokens <= 40  # and remembered for the steps of training
    most[0] = 15
    other = cached(tmp_path / "other", "float32", []).states
    with pytest.raises(ValueError, match="out of memory on one sample of 20 teacher tokens"):
        fill(other, rows, missing_rows(other, rows))


# ---- identity --------------------------------------------------------------------------------


def digest(folder: Path, root: Path, dtype: torch.dtype = torch.float32, **teacher: Any) -> str:
    config = TeacherConfig.model_validate({"base_model": str(folder), **teacher})
    return teacher_identity(config, dtype, root).digest


def test_the_identity_follows_content_and_nothing_else(pair_folder: Path):
    teacher = pair_folder / "teacher"
    one = digest(teacher, pair_folder / "memo")
    moved = pair_folder / "elsewhere"
    shutil.copytree(teacher, moved)
    (moved / "README.md").write_text("changed")
    assert digest(moved, pair_folder / "memo") == one
    assert digest(moved, pair_folder / "other memo", attn_implementation="eager") == one
    found = {one, digest(teacher, pair_folder, torch.bfloat16)}
    found.add(digest(teacher, pair_folder, load_in_4bit=True))
    found.add(digest(teacher, pair_folder, load_in_8bit=True))
    weights = moved / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    found.add(digest(moved, pair_folder / "memo"))
    shutil.copy(teacher / "model.safetensors", weights)
    config = moved / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    found.add(digest(moved, pair_folder / "memo"))
    assert len(found) == 6


def test_a_served_teacher_is_known_by_its_name_there_too(pair_folder: Path):
    """Files here cannot tell an adapter or a fine-tune that the server has."""
    teacher = pair_folder / "teacher"

    def served(**keys: Any) -> str:
        return digest(teacher, pair_folder / "memo", server={"url": "http://a", **keys})

    assert served() == served(model=str(teacher), timeout=3.0)
    assert len({served(), served(model="tuned"), served(model="tuned again")}) == 3


def test_weights_in_shards_have_an_identity_and_missing_ones_are_an_error(pair_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(pair_folder / "teacher")
    sharded = pair_folder / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one = digest(sharded, pair_folder / "memo")
    last = max(sharded.glob("*.safetensors"))
    damaged = bytearray(last.read_bytes())
    damaged[-1] ^= 1
    last.write_bytes(damaged)
    assert digest(sharded, pair_folder / "memo") != one
    for path in sharded.glob("model*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        digest(sharded, pair_folder / "memo")


# ---- training --------------------------------------------------------------------------------


def block(folder: Path, cache: dict[str, Any] | None, **teacher: Any) -> dict[str, Any]:
    teacher = {"base_model": str(folder / "teacher"), **teacher}
    if cache is not None:
        teacher["cache"] = {"path": str(folder / "cache"), **cache}
    return {"teacher": teacher}


PACKED = {
    "sample_packing": True,
    "eval_sample_packing": True,
    "micro_batch_size": 1,
    "sequence_len": 256,
}


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [
        ({}, "float32", 1e-6),
        ({}, "bfloat16", 1e-3),
        pytest.param(PACKED, "float32", 1e-6, marks=pytest.mark.slow),
    ],
    ids=["padded-float32", "padded-bfloat16", "packed-float32"],
)
def test_twenty_steps_from_the_cache_give_the_live_runs_losses(
    pair_folder: Path,
    train: Train,
    loads: list[int],
    layout: dict[str, Any],
    dtype: str,
    tolerance: float,
):
    def config(name: str, cache: dict[str, Any] | None) -> dict[str, Any]:
        return tiny.base_config(
            pair_folder,
            max_steps=20,
            output_dir=str(pair_folder / name),
            dskd=block(pair_folder, cache),
            **layout,
        )

    plain = losses(train(config("live", None))[1])
    during = losses(train(config("during", {"dtype": dtype}))[1])
    assert len(loads) == 1
    after = losses(train(config("after", {"dtype": dtype}))[1])
    assert len(loads) == 1  # the second run never loaded the teacher
    assert len(plain) == 20
    assert during == pytest.approx(plain, rel=tolerance)
    assert after == pytest.approx(plain, rel=tolerance)
    assert after == pytest.approx(during, rel=1e-6)


@pytest.mark.slow
def test_another_batch_order_student_and_seed_hit_the_same_cache(
    pair_folder: Path, train: Train, loads: list[int]
):
    cache = block(pair_folder, {})
    train(tiny.base_config(pair_folder, num_epochs=1, max_steps=None, dskd=cache))
    tiny.tiny_llama(400, 16, seed=9).save_pretrained(pair_folder / "student")
    loads.clear()
    for change in (
        {"seed": 8, "micro_batch_size": 3},
        {**PACKED, "max_steps": 3},
        {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2},
    ):
        train(tiny.base_config(pair_folder, dskd=cache, **change))
    assert not loads


def test_the_body_is_freed_after_the_epoch_that_filled_the_cache(
    pair_folder: Path, train: Train, loads: list[int], monkeypatch: pytest.MonkeyPatch
):
    ran: list[int] = []
    run = live.LiveTeacher.states

    def counted(self: LiveTeacher, now: DualBatch) -> Any:
        ran.append(len(now.teacher_labels))
        return run(self, now)

    monkeypatch.setattr(live.LiveTeacher, "states", counted)
    config = tiny.base_config(
        pair_folder,
        num_epochs=3,
        max_steps=None,
        micro_batch_size=5,  # sixteen rows: the last batch of an epoch is smaller
        val_set_size=0.25,
        eval_strategy="epoch",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=2,
        dskd=block(pair_folder, {"dtype": "int8"}),
    )
    _, trainer = train(config)
    assert sum(ran) == 16  # every row, training and evaluation, once
    assert len(loads) == 1
    assert not teacher_of(trainer).states.body.is_loaded
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert all("eval_dskd/teacher_space" in entry for entry in evaluations)


def test_without_a_cache_block_nothing_is_written(pair_folder: Path, train: Train):
    _, trainer = train(tiny.base_config(pair_folder, max_steps=1))
    assert isinstance(teacher_of(trainer), LiveTeacher)
    assert not (pair_folder / "cache").exists()


def test_a_teacher_that_differs_in_dtype_is_told_apart_in_words(
    pair_folder: Path, cache_warnings: list[str]
):
    def opened(dtype: str) -> CachedStates:
        config = block(pair_folder, {}, dtype=dtype)["teacher"]
        return open_cache(TeacherSpec(TeacherConfig.model_validate(config), 600, CPU))

    one = opened("float32")
    two = opened("bfloat16")
    assert one.store.folder != two.store.folder
    assert "differs in dtype" in cache_warnings[0]
    assert not opened("float32").body.is_loaded


def test_a_body_that_was_loaded_for_its_head_alone_is_given_back(pair_folder: Path):
    config = TeacherConfig.model_validate(block(pair_folder, {})["teacher"])
    states = open_cache(TeacherSpec(config, 600, CPU))  # neither head nor embedding are cached
    assert states.body.is_loaded
    model = weakref.ref(states.body.get().model)
    states.body.free()
    assert model() is None


@pytest.mark.slow
def test_a_teacher_in_four_bits_is_cached_as_it_is(tmp_path: Path, train: Train, loads: list[int]):
    tiny.save_pair(tmp_path, hidden_sizes=(32, 64))
    pair_folder, four = tmp_path, {"load_in_4bit": True}
    settings = {"num_epochs": 1, "max_steps": None}
    plain = losses(
        train(tiny.base_config(pair_folder, dskd=block(pair_folder, None, **four), **settings))[1]
    )
    cached = block(pair_folder, {"dtype": "float32"}, **four)
    for _ in range(2):
        found = losses(train(tiny.base_config(pair_folder, dskd=cached, **settings))[1])
        assert found == pytest.approx(plain, rel=1e-5)
    assert len(loads) == 1


def test_what_the_door_opens_gives_and_is_told_the_same_whatever_its_kind(pair_folder: Path):
    run = TrainingRun(datasets=lambda: [teacher_sides([12, 7])])
    live_view: View | None = None
    for cache in (None, {"dtype": "float32"}, {"dtype": "float32"}):
        config = TeacherConfig.model_validate(block(pair_folder, cache)["teacher"])
        teacher = open_teacher(TeacherSpec(config, 600, CPU), run)
        teacher.begin()
        assert (teacher.reader() is None) == (cache is None)
        view = teacher(batch([12, 7]), NEEDS)
        assert view.head is teacher.head
        assert not teacher.head.trainable
        assert teacher.embedding.shape[1] == teacher.head.hidden_size
        assert teacher(batch([12, 7]), Needs()).embedded is None
        teacher.idle(batch([12, 7]))
        live_view = live_view or view
        torch.testing.assert_close(view.hidden, live_view.hidden)
        torch.testing.assert_close(view.embedded, live_view.embedded, rtol=0, atol=0)
        teacher.end_epoch(more=True)
        teacher.end()
    assert isinstance(teacher, CachedTeacher)
    assert not teacher.states.body.is_loaded


def teacher_sides(lengths: list[int]) -> Dataset:
    """The rows of `batch`, as preparation leaves them."""
    rows = batch(lengths)
    sides = {"teacher_input_ids": rows.teacher_input_ids, "teacher_labels": rows.teacher_labels}
    return Dataset.from_dict(
        {
            column: [row[:n].tolist() for row, n in zip(side, lengths, strict=True)]
            for column, side in sides.items()
        }
    )
