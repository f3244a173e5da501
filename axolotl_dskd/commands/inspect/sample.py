"""A sample of the user's own rows, dataset by dataset, through the very pipeline that trains.

Rows are chosen before anything is tokenized, so a dataset of millions costs what a sample costs.
What happened to each row is counted: nothing disappears without a reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from axolotl.utils.data import sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.exceptions import DatasetsError

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.reconcile import (
    CUT,
    DIFFERENT,
    EMPTY,
    KEPT,
    STATUS,
    TOO_LONG,
    differing_example,
)
from axolotl_dskd.data.routing import rows_of_teacher

#: Outcomes of a row beside those of `reconcile`.
UNTOKENIZED, STUDENT_LENGTH = "not tokenized", "student too long or empty"

#: Outcome -> what it means and what to do, for people.
OUTCOMES = {
    KEPT: "trained on as it is",
    CUT: "trained on, cut to the text that both sides supervise",
    STUDENT_LENGTH: "dropped: longer than sequence_len in student tokens, or nothing in it",
    TOO_LONG: "dropped: longer than the teacher's limit in teacher tokens",
    EMPTY: "dropped: one side supervises no text",
    DIFFERENT: "dropped: the two sides do not supervise the same text",
    UNTOKENIZED: "dropped: the dataset's `type:` made nothing of it",
}

#: Outcome -> what to look at where it happens to all rows.
REMEDIES = {
    STUDENT_LENGTH: "raise sequence_len, or set excess_length_strategy: truncate",
    TOO_LONG: "raise dskd.teacher.sequence_len, or set excess_length_strategy: truncate",
    EMPTY: "the template marks nothing to train on; look at roles_to_train, train_on_inputs and "
    "the fields of the rows",
    DIFFERENT: "look at chat_template, dskd.teacher.chat_template, and whether both tokenizers "
    "keep the text as it is",
    UNTOKENIZED: "look at the dataset's type and its fields",
}


@dataclass
class DatasetSample:
    """What became of the sampled rows of one dataset.

    Attributes:
        name: as in the configuration, with the subset's name where there is one.
        total: rows that the dataset has; `sampled` of them were read.
        outcomes: outcome -> rows (of the tokenized ones where a raw row becomes several).
        rows: the two-sided rows that would be trained on.
        differing: of the first rows whose texts differ, both texts.
    """

    name: str
    total: int
    sampled: int
    outcomes: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, list[int]]] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Rows that would be trained on."""
        return self.outcomes[KEPT] + self.outcomes[CUT]


def _choosing(count: int, seed: int, sizes: list[int]) -> Callable[..., Any]:
    """Axolotl's own door to tokenizing, for `count` rows of a dataset; its sizes go to `sizes`."""
    tokenize = sft.get_dataset_wrapper

    def choose(*args: Any, dataset: Any, **kwargs: Any) -> Any:
        total = len(dataset)
        if total > count:
            dataset = dataset.select(sorted(random.Random(seed).sample(range(total), count)))
        sizes.extend((total, len(dataset)))
        return tokenize(*args, dataset=dataset, **kwargs)

    return choose


def sample_rows(
    cfg: Any, config: DSKDConfig, tokenizer: Any, *, count: int, teacher: int = 0
) -> list[DatasetSample]:
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
    for dataset_config in datasets_with_name_generator(cfg.datasets):
        name = str(dataset_config.path)
        if dataset_config.name:
            name += f" ({dataset_config.name})"
        sizes: list[int] = []
        choose = _choosing(count, cfg.seed or 0, sizes)
        with mock.patch.object(sft, "get_dataset_wrapper", choose):
            try:
                rows, _ = sft._load_and_process_single_dataset(
                    dataset_config=dataset_config,
                    cfg=cfg,
                    tokenizer=tokenizer,
                    split="train",
                    seed=cfg.seed,
                )
            except StopIteration as error:
                raise ValueError(f"dataset {name} cannot be read: it has no rows") from error
            except (OSError, KeyError, DatasetsError) as error:
                why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
                raise ValueError(f"dataset {name} cannot be read: {why}") from error
            except ValueError as error:
                if name in str(error):
                    raise
                raise ValueError(f"dataset {name}: {error}") from error
        total, sampled = sizes
        mine = rows_of_teacher(rows, teacher)
        if len(mine) < len(rows):  # several teachers: as if the others' rows were not there
            share = len(mine) / len(rows)
            total, sampled = round(total * share), round(sampled * share)
        sample = DatasetSample(name, total=total, sampled=sampled)
        sample.outcomes[UNTOKENIZED] = max(0, sample.sampled - len(mine))
        _follow(sample, mine, cfg, reconcile)
        samples.append(sample)
    return samples


def _follow(sample: DatasetSample, rows: Dataset, cfg: Any, reconcile: Any) -> None:
    """Length limits, then the comparison of the two sides, counted."""
    before = len(rows)
    if before:
        rows = handle_long_seq_in_dataset(rows, cfg.sequence_len, cfg)
    sample.outcomes[STUDENT_LENGTH] = before - len(rows)
    for row in rows:
        both = reconcile(row)
        status = both.pop(STATUS)
        sample.outcomes[status] += 1
        if status == DIFFERENT and len(sample.differing) < 3:
            sample.differing.append(differing_example({**row, **both}, reconcile))
        if status in (KEPT, CUT):
            sample.rows.append({"input_ids": list(row["input_ids"]), **both})
