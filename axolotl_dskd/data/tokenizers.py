"""The teacher's tokenizer and limits, and whether two tokenizers share one vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow.compute as pc
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from axolotl_dskd.config import DSKDConfig, loading
from axolotl_dskd.data.byte_spans import BYTES_PER_TOKEN, Spans, exact_pairs, kept_apart
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.supervision import IGNORE_INDEX


@lru_cache(maxsize=16)
def _load_tokenizer(name: str, revision: str | None, trust: bool) -> PreTrainedTokenizerBase:
    advice = (
        "Check dskd.teacher.base_model, .tokenizer and .revision; a gated model needs "
        "`hf auth login`, one with code of its own dskd.teacher.trust_remote_code: true."
    )
    with loading(f"the teacher's tokenizer {name!r}", advice):
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)


def load_teacher_tokenizer(config: DSKDConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, loaded once per process.

    Raises:
        ValueError: it cannot be loaded, or a path of the teacher's does not exist.
    """
    teacher = config.one_teacher
    teacher.check_paths()
    revision = teacher.revision if teacher.tokenizer is None else None
    return _load_tokenizer(teacher.tokenizer_name, revision, teacher.trust_remote_code)


@lru_cache(maxsize=16)
def _position_limit(name: str, revision: str | None, trust: bool) -> int:
    advice = (
        "Check dskd.teacher.base_model and .revision; a gated model needs `hf auth login`, one "
        "with code of its own dskd.teacher.trust_remote_code: true."
    )
    with loading(f"the teacher {name!r}", advice):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def teacher_position_limit(config: DSKDConfig) -> int:
    """Longest teacher side of a row: `sequence_len`, or what the model's config allows.

    Raises:
        ValueError: the teacher's config cannot be loaded, or allows less than `sequence_len`.
    """
    teacher = config.one_teacher
    limit = _position_limit(teacher.base_model, teacher.revision, teacher.trust_remote_code)
    if teacher.gives == "logprobs":
        limit -= 1  # a server that is asked for them writes a token behind the row
    if teacher.sequence_len and teacher.sequence_len > limit:
        raise ValueError(
            f"dskd.teacher.sequence_len is {teacher.sequence_len}, but {teacher.base_model} has "
            f"positions for {limit} tokens. Lower it, or leave it out."
        )
    return teacher.sequence_len or limit


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that the tokenizer can emit (added tokens included)."""
    return max(tokenizer.get_vocab().values()) + 1


def longest_supervised(datasets: Iterable[Any]) -> int | None:
    """Supervised student tokens of the longest row of prepared data sets; None without rows."""
    counts = []
    for dataset in datasets:
        if dataset is not None and SPANS in (getattr(dataset, "column_names", None) or ()):
            column = dataset.select_columns([SPANS]).with_format("arrow")
            counts += [pc.max(pc.binary_length(t[SPANS])).as_py() or 0 for t in column.iter(10_000)]
    return max(counts) // BYTES_PER_TOKEN if counts else None


def exact_share(dataset: Any) -> float | None:
    """Share of the supervised student tokens of a prepared data set that have an exact pair.

    None without data, or for data without supervised tokens. Of the first 20,000 rows of a larger
    one: the same on every rank.
    """
    if dataset is None or SPANS not in (getattr(dataset, "column_names", None) or ()):
        return None
    rows = dataset.select(range(min(len(dataset), 20_000))).select_columns([SPANS, TEACHER_SPANS])
    tokens = paired = 0
    for table in rows.with_format("arrow").iter(1000):
        student, student_rows = Spans.of_rows(table[SPANS].to_pylist())
        teacher, teacher_rows = Spans.of_rows(table[TEACHER_SPANS].to_pylist())
        pairs, _ = exact_pairs(*kept_apart(student, student_rows, teacher, teacher_rows))
        tokens, paired = tokens + len(student), paired + len(pairs)
    return paired / tokens if tokens else None


def turn_ends(dataset: Any, student: Any, teacher: Any) -> tuple[int, int] | None:
    """The tokens with which most rows of a prepared data set end, student's first.

    None without data, or where rows end with text. Of the first 1,000 rows of a larger one: the
    same on every rank.

    Args:
        student, teacher: the tokenizers.
    """
    if dataset is None or SPANS not in (getattr(dataset, "column_names", None) or ()):
        return None
    columns = ["labels", "teacher_labels"]
    rows = dataset.select(range(min(len(dataset), 1000))).select_columns(columns)
    return ends_of(rows, student, teacher)


def ends_of(
    rows: Iterable[Mapping[str, Sequence[int]]], student: Any, teacher: Any
) -> tuple[int, int] | None:
    """`turn_ends` of some prepared rows."""
    tables = token_bytes(student), token_bytes(teacher)
    found: Counter[tuple[int, int]] = Counter()
    for row in rows:
        sides = row["labels"], row["teacher_labels"]
        ours, theirs = ([i for i in side if i != IGNORE_INDEX][-1:] for side in sides)
        if ours and theirs and not tables[0][ours[0]] and not tables[1][theirs[0]]:
            found[ours[0], theirs[0]] += 1
    return found.most_common(1)[0][0] if found else None
