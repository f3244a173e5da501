"""The teacher's tokenizer and limits, and whether two tokenizers share one vocabulary."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from axolotl_dskd.config import DSKDConfig


@lru_cache(maxsize=4)
def _load_tokenizer(name: str, revision: str | None, trust: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the teacher's tokenizer cannot be loaded from {name!r}: {error}\n"
            "Check dskd.teacher.base_model, .tokenizer and .revision; a gated model needs "
            "`hf auth login`, one with code of its own dskd.teacher.trust_remote_code: true."
        ) from error


def load_teacher_tokenizer(config: DSKDConfig) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, loaded once per process.

    Raises:
        ValueError: it cannot be loaded, or a path of the teacher's does not exist.
    """
    teacher = config.teacher
    teacher.check_paths()
    revision = teacher.revision if teacher.tokenizer is None else None
    return _load_tokenizer(teacher.tokenizer_name, revision, teacher.trust_remote_code)


@lru_cache(maxsize=4)
def _position_limit(name: str, revision: str | None, trust: bool) -> int:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the teacher {name!r} cannot be loaded: {error}\n"
            "Check dskd.teacher.base_model and .revision; a gated model needs `hf auth login`, "
            "one with code of its own dskd.teacher.trust_remote_code: true."
        ) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def teacher_position_limit(config: DSKDConfig) -> int:
    """Longest teacher side of a row: `sequence_len`, or what the model's config allows.

    Raises:
        ValueError: the teacher's config cannot be loaded, or allows less than `sequence_len`.
    """
    teacher = config.teacher
    limit = _position_limit(teacher.base_model, teacher.revision, teacher.trust_remote_code)
    if teacher.sequence_len and teacher.sequence_len > limit:
        raise ValueError(
            f"dskd.teacher.sequence_len is {teacher.sequence_len}, but {teacher.base_model} has "
            f"positions for {limit} tokens. Lower it, or leave it out."
        )
    return teacher.sequence_len or limit


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id that the tokenizer can emit (added tokens included)."""
    return max(tokenizer.get_vocab().values()) + 1


def resolve_alignment(
    config: DSKDConfig, student: Any, teacher: PreTrainedTokenizerBase
) -> tuple[Literal["positions", "cma"], str]:
    """Which alignment a run uses, and why, in words.

    Raises:
        ValueError: `positions` for vocabularies that differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = ours.items() ^ theirs.items()
    if config.alignment == "cma":
        return "cma", "cross-model attention, as configured"
    if not differing:
        return "positions", f"position by position: both vocabularies are the same {len(ours)}"
    token, index = min(differing, key=lambda item: (item[1], item[0]))
    example = (
        f"they differ in {len({i for _, i in differing})} ids, such as id {index} "
        f"({token!r} on one side only)"
    )
    if config.alignment == "positions":
        raise ValueError(
            f"alignment: positions needs identical vocabularies, but {example}. "
            "Use alignment: cma, or auto."
        )
    return "cma", f"cross-model attention: {len(ours)} and {len(theirs)} tokens, {example}"
