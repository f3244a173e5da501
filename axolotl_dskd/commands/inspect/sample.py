"""A sample of the user's own rows, dataset by dataset, through the very pipeline that trains.

Rows are chosen before anything is tokenized, so a dataset of millions costs what a sample costs.
What happened to each row is counted: nothing disappears without a reason.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

from axolotl.utils.data import sft
from axolotl.utils.data.shared import datasets_with_name_generator
from axolotl.utils.data.utils import handle_long_seq_in_dataset
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from datasets.exceptions import DatasetsError

from axolotl_dskd.commands.inspect.rows import AlignedRow, Coverage
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.outcomes import CUT, DIFFERENT, KEPT, STUDENT_LENGTH, UNTOKENIZED
from axolotl_dskd.data.reconcile import STATUS, differing_example
from axolotl_dskd.data.routing import rows_of_teacher


@dataclass(frozen=True)
class Sample:
    """What became of the sampled rows of one dataset.

    Attributes:
        coverage: what was counted.
        rows: the two-sided rows that would be trained on; `aligned`: their supervised tokens.
        differing: of the first rows whose texts differ, both texts.
    """

    coverage: Coverage
    rows: Sequence[dict[str, list[int]]]
    aligned: Sequence[AlignedRow]
    differing: Sequence[str]

    @classmethod
    def together(cls, samples: Sequence[Sample]) -> Sample:
        """Several as if they were of one dataset."""
        columns = zip(*((s.rows, s.aligned, s.differing) for s in samples), strict=True)
        coverage = sum((sample.coverage for sample in samples), Coverage("all"))
        return cls(coverage, *(list(chain(*column)) for column in columns))


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
        kept: list[dict[str, Any]] = []
        differing: list[str] = []
        for row in rows:
            both = reconcile(row)
            status = both.pop(STATUS)
            outcomes[status] += 1
            if status == DIFFERENT and len(differing) < 3:
                differing.append(differing_example({**row, **both}, reconcile))
            if status in (KEPT, CUT):
                kept.append({"input_ids": list(row["input_ids"]), **both})
        aligned = [AlignedRow.of(row) for row in kept]
        tokens = ((len(row.student), len(row.teacher), row.exact) for row in aligned)
        sums = map(sum, zip(*tokens, strict=True))
        coverage = Coverage(name, total, sampled, outcomes, *sums)
        samples.append(Sample(coverage, kept, aligned, differing))
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
    return rows, total, sampled
