"""Answers that the student writes to held-out prompts, and how near they are to the references.

Knows token ids, a writer and text; not where the student lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from axolotl_dskd.config import EvaluationConfig
from axolotl_dskd.generation import Sampling, Writer, prompt_seed
from axolotl_dskd.ranks import gather_objects, rank, world_size
from axolotl_dskd.types import IGNORE_INDEX


@dataclass(frozen=True)
class Prompt:
    """A prompt with the reference that follows it, both as ids."""

    ids: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Answered:
    """A prompt, its reference and the student's answers as text, with their Rouge-L (0 to 1)."""

    prompt: str
    reference: str
    greedy: str
    sampled: str
    rouge_l: float
    rouge_l_sampled: float


def held_out_prompts(dataset: Any, count: int) -> list[Prompt]:
    """The first rows of a prepared data set with something before what they supervise, each up to
    its first answer."""
    prompts: list[Prompt] = []
    for row in dataset.select_columns(["input_ids", "labels"]):
        if len(prompts) == count:
            break
        ids, labels = list(row["input_ids"]), list(row["labels"])
        begin = next((k for k, label in enumerate(labels) if label != IGNORE_INDEX), 0)
        end = next((k for k in range(begin, len(ids)) if labels[k] == IGNORE_INDEX), len(ids))
        if begin:
            prompts.append(Prompt(ids[:begin], ids[begin:end]))
    return prompts


def end_ids(prompts: Sequence[Prompt], eos: int | None, token_bytes: Sequence[bytes]) -> list[int]:
    """The tokens that end an answer: the tokenizer's own, and what ends the references without
    standing for text (a template's end of turn)."""
    last = {prompt.reference[-1] for prompt in prompts}
    ends = {token for token in last if not token_bytes[token]}
    return sorted(ends | ({eos} if eos is not None else set()))


def answer(
    prompts: Sequence[Prompt],
    writer: Writer,
    config: EvaluationConfig,
    tokenizer: Any,
    seed: int,
    max_length: int | None = None,
) -> list[Answered]:
    """Greedy and sampled answers to all prompts; ranks share them, and each gets all.

    Args:
        seed: of what is sampled; the same one and the same student give the same answers.
        max_length: tokens of a prompt and its answer that the student can read; None: any number.
    """
    mine = list(prompts)[rank() :: world_size()]
    ids = [prompt.ids for prompt in mine]
    texts = []
    for temperature in (0.0, config.temperature):
        sampling = Sampling(config.max_new_tokens, temperature, max_length=max_length)
        written = writer.write(ids, sampling, [prompt_seed(prompt, seed) for prompt in ids])
        texts.append([_text(tokenizer, found.ids) for found in written])
    scores = RougeL()
    answered = []
    for prompt, greedy, sampled in zip(mine, *texts, strict=True):
        reference = _text(tokenizer, prompt.reference)
        answered.append(
            Answered(
                tokenizer.decode(prompt.ids),
                reference,
                greedy,
                sampled,
                scores(reference, greedy),
                scores(reference, sampled),
            )
        )
    parts = gather_objects(answered)
    return [parts[k % len(parts)][k // len(parts)] for k in range(len(prompts))]


def means(answered: Sequence[Answered]) -> dict[str, float]:
    """Rouge-L of greedy and of sampled answers; nothing without answers."""
    if not answered:
        return {}
    return {
        "dskd/rouge_l": fmean(found.rouge_l for found in answered),
        "dskd/rouge_l_sampled": fmean(found.rouge_l_sampled for found in answered),
    }


def as_dicts(answered: Sequence[Answered]) -> list[dict[str, Any]]:
    """For a record."""
    return [asdict(found) for found in answered]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


class RougeL:
    """F1 of the longest common subsequence of words (Lin 2004), words stemmed, as published work
    on distillation reports it. Its words are Latin letters and digits: no other script counts."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def __call__(self, reference: str, answer: str) -> float:
        """0 to 1."""
        return float(self._scorer.score(reference, answer)["rougeL"].fmeasure)
