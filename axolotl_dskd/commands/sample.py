"""A sample of the user's own rows, dataset by dataset, through the very pipeline that trains.

Rows are chosen before anything is tokenized, so a dataset of millions costs what a sample costs.
What happened to each row is counted: nothing disappears without a reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

from axolotl.utils.data import sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.exceptions import DatasetsError

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.collator import find_matches
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.outcomes import CUT, DIFFERENT, KEPT, STUDENT_LENGTH, UNTOKENIZED
from axolotl_dskd.data.reconcile import SPANS, STATUS, TEACHER_SPANS, differing_example
from axolotl_dskd.data.routing import rows_of_teacher
from axolotl_dskd.types import Matches


@dataclass(frozen=True)
class Sample:
    """What became of the sampled rows of one dataset (or of all of them).

    Attributes:
        name: as in the configuration, with the subset's name where there is one.
        total: rows that the dataset has; `sampled` of them were read.
        outcomes: outcome -> rows (of the tokenized ones where a raw row becomes several).
        rows: those that would be trained on, as preparation leaves them.
        differing: of rows whose texts differ, both texts.
    """

    name: str
    total: int
    sampled: int
    outcomes: Counter[str]
    rows: list[dict[str, Any]] = field(repr=False)
    differing: list[str] = field(repr=False)

    @classmethod
    def together(cls, samples: Sequence[Sample]) -> Sample:
        """Several as if they were of one dataset."""
        return cls(
            "all",
            sum(sample.total for sample in samples),
            sum(sample.sampled for sample in samples),
            sum((sample.outcomes for sample in samples), Counter()),
            [row for sample in samples for row in sample.rows],
            [texts for sample in samples for texts in sample.differing],
        )

    @property
    def kept(self) -> int:
        """Rows that would be trained on."""
        return len(self.rows)

    @cached_property
    def _matches(self) -> Matches:
        return find_matches(*([row[c] for row in self.rows] for c in (SPANS, TEACHER_SPANS)))

    @property
    def student_tokens(self) -> int:
        """Supervised ones."""
        return len(self._matches.spans)

    @property
    def teacher_tokens(self) -> int:
        """Supervised ones."""
        return len(self._matches.teacher_spans)

    @property
    def share(self) -> float:
        """Of the student's supervised tokens, those with an exact partner."""
        return len(self._matches.exact) / max(1, self.student_tokens)


def sample_rows(
    cfg: Any, config: DSKDConfig, tokenizer: Any, *, count: int, teacher: int = 0
) -> list[Sample]:
    """Up to `count` rows of every training dataset, prepared for both sides.

    Args:
        cfg: Axolotl's validated configuration; `tokenizer`: the student's.
        config: the `dskd:` block with one teacher.
        teacher: its number: of several, only the rows that ask it are followed.

    Raises:
        ValueError: a dataset cannot be loaded or prepared; the message says which and why.
    """
    cfg = DictDefault({**cfg, "dataset_num_proc": 1})
    truncates = (cfg.excess_length_strategy or "drop").lower() == "truncate"
    reconcile = make_reconcile(config, tokenizer, truncate_teacher=truncates)
    samples = []
    for dataset in datasets_with_name_generator(cfg.datasets):
        name = f"{dataset.path} ({dataset.name})" if dataset.name else str(dataset.path)
        everyones, total, sampled = _tokenized(name, dataset, cfg, tokenizer, count)
        rows = rows_of_teacher(everyones, teacher)
        if len(rows) < len(everyones):  # several teachers: as if the others' rows were not there
            share = len(rows) / len(everyones)
            total, sampled = round(total * share), round(sampled * share)
        outcomes = Counter({UNTOKENIZED: max(0, sampled - len(rows)), STUDENT_LENGTH: len(rows)})
        if len(rows):
            rows = handle_long_seq_in_dataset(rows, cfg.sequence_len, cfg)
        outcomes[STUDENT_LENGTH] -= len(rows)
        prepared = [{**row, **reconcile(row)} for row in rows]
        outcomes.update(row[STATUS] for row in prepared)
        kept = [row for row in prepared if row[STATUS] in (KEPT, CUT)]
        different = [row for row in prepared if row[STATUS] == DIFFERENT]
        differing = [differing_example(row, reconcile) for row in different]
        samples.append(Sample(name, total, sampled, outcomes, kept, differing))
    return samples


def _tokenized(
    name: str, dataset: Any, cfg: Any, tokenizer: Any, count: int
) -> tuple[Dataset, int, int]:
    """Up to `count` rows of a dataset, tokenized; how many there are, and how many were chosen."""
    sizes: list[int] = []
    tokenize = sft.get_dataset_wrapper

    def choose(*args: Any, dataset: Any, **kwargs: Any) -> Any:
        """Axolotl's own door to tokenizing, for some of the rows."""
        total = len(dataset)
        if total > count:
            chosen = random.Random(cfg.seed or 0).sample(range(total), count)
            dataset = dataset.select(sorted(chosen))
        sizes.extend((total, len(dataset)))
        return tokenize(*args, dataset=dataset, **kwargs)

    try:
        with mock.patch.object(sft, "get_dataset_wrapper", choose):
            rows, _ = sft._load_and_process_single_dataset(
                dataset_config=dataset, cfg=cfg, tokenizer=tokenizer, split="train", seed=cfg.seed
            )
    except (OSError, KeyError, ValueError, DatasetsError, StopIteration) as error:
        why = str(error) or "it has no rows"  # StopIteration says nothing itself
        if isinstance(error, DatasetsError):
            why += f" ({error.__cause__})"
        raise ValueError(f"dataset {name} cannot be read: {why}") from error
    total, sampled = sizes
    return rows, total, sampled
