"""From a configuration to its report: joins sample, rows, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.fit import Setup, memory_report
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.rows import (
    AlignedRow,
    Coverage,
    Vocabulary,
    pick_examples,
)
from axolotl_dskd.commands.inspect.sample import OUTCOMES, REMEDIES, DatasetSample, sample_rows
from axolotl_dskd.commands.inspect.sides import side_facts, side_remarks
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.reconcile import DIFFERENT, MAX_DIFFERING_SHARE
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.planning.skeleton import student_skeleton, teacher_skeleton


def inspect_run(
    path: str,
    cfg: Any,
    config: DSKDConfig,
    *,
    card: Card,
    rows: int,
    probe_count: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report of one configuration.

    Args:
        path: of the configuration, for the report's title.
        cfg: Axolotl's validated configuration; `config`: its `dskd:` block.
        rows: sampled of each dataset.
        probe_count: rows on which to compare the quantised teacher with its unquantised form.
        progress: told what is being done.

    Raises:
        ValueError: something of the configuration cannot be loaded or used, in words.
    """
    if not config.uses_teacher:
        raise ValueError("dskd.kd_ratio is 0: this run uses no teacher, so there is no pair.")
    if probe_count:
        check_quantised(config.one_teacher)
    progress("tokenizers")
    vocabularies = _vocabularies(cfg, config)
    tokenizers = vocabularies[0].tokenizer, vocabularies[1].tokenizer
    progress("rows")
    samples = sample_rows(cfg, config, tokenizers[0], count=rows)
    kept = [row for sample in samples for row in sample.rows]
    aligned = [(sample, [AlignedRow.of(row) for row in sample.rows]) for sample in samples]
    datasets = [Coverage.of(*dataset, *vocabularies) for dataset in aligned]
    coverage = sum(datasets, Coverage("all"))
    if not kept:
        raise ValueError(_nothing_kept(coverage, samples))
    progress("models")
    student = student_skeleton(cfg, tokenizers[0])
    teacher = teacher_skeleton(config.one_teacher, card.device)
    names = str(cfg.base_model), config.one_teacher.base_model
    ours, theirs = (
        side_facts(model, tokenizer, name, kept, prefix, rate)
        for model, tokenizer, name, prefix, rate in zip(
            (student, teacher), tokenizers, names, ("", "teacher_"), coverage.rates, strict=True
        )
    )
    facts = Facts(*tokenizers, (ours.vocabulary, theirs.vocabulary), coverage.share)
    objective = build_objective(config, facts, memory=card.memory, seed=0)
    remarks = [
        *_differing(coverage, samples),
        *side_remarks(ours, tokenizers[0], "student"),
        *side_remarks(theirs, tokenizers[1], "teacher"),
    ]
    progress("memory")
    memory = memory_report(Setup(cfg, config, card, samples, facts), student, teacher)
    fidelity = None
    if probe_count:
        device = torch.device("cuda" if torch.cuda.is_available() and card.gpu else "cpu")
        probed = probe_rows(kept, probe_count)
        result = probe(config.one_teacher, probed, theirs.vocabulary, device, progress)
        fidelity = result.words("4 bits" if config.one_teacher.load_in_4bit else "8 bits")
    return Report(
        config=path,
        student=ours,
        teacher=theirs,
        shared_tokens=len(shared_tokens(*tokenizers)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=coverage,
        datasets=datasets,
        examples=pick_examples(aligned, *vocabularies),
        memory=memory,
        remarks=remarks,
        probe=fidelity,
    )


def _vocabularies(cfg: Any, config: DSKDConfig) -> tuple[Vocabulary, Vocabulary]:
    try:
        student = load_tokenizer(cfg)
    except (OSError, KeyError) as error:
        raise ValueError(
            "the student's tokenizer cannot be loaded from "
            f"{cfg.tokenizer_config or cfg.base_model!r}: {error}"
        ) from error
    teacher = load_teacher_tokenizer(config)
    return Vocabulary(student, token_bytes(student)), Vocabulary(teacher, token_bytes(teacher))


def _nothing_kept(coverage: Coverage, samples: Sequence[DatasetSample]) -> str:
    outcomes = [
        f"{count} {OUTCOMES[outcome]}; {REMEDIES[outcome]}."
        for outcome, count in coverage.outcomes.items()
        if count
    ]
    first = f"none of the {coverage.sampled} sampled rows would be trained on."
    return "\n".join([first, *outcomes, *(line for s in samples for line in s.differing)])


def _differing(coverage: Coverage, samples: Sequence[DatasetSample]) -> Iterator[str]:
    """What training will say of rows whose two sides spell different texts."""
    count, seen = coverage.outcomes.get(DIFFERENT, 0), sum(coverage.outcomes.values())
    if count > MAX_DIFFERING_SHARE * seen:
        examples = [line for sample in samples for line in sample.differing][:3]
        yield (
            f"Training will stop: {count} of {seen} sampled rows do not have the same supervised "
            f"text for student and teacher, more than {MAX_DIFFERING_SHARE:.0%}; "
            f"{REMEDIES[DIFFERENT]}.\n" + "\n".join(examples)
        )
