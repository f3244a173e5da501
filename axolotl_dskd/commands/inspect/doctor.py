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
from axolotl_dskd.config import DSKDConfig, about_teacher
from axolotl_dskd.data.reconcile import DIFFERENT, MAX_DIFFERING_SHARE
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.planning.skeleton import student_skeleton, teacher_skeleton


def inspect_run(
    path: str,
    cfg: Any,
    config: DSKDConfig,
    *,
    card: Card,
    rows: int,
    teacher: str | None = None,
    probe_count: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report of one configuration.

    Args:
        path: of the configuration, for the report's title.
        cfg: Axolotl's validated configuration; `config`: its `dskd:` block.
        rows: sampled of each dataset.
        teacher: the name of the one to look at, where there are several.
        probe_count: rows on which to compare the quantised teacher with its unquantised form.
        progress: told what is being done.

    Raises:
        ValueError: something of the configuration cannot be loaded or used, in words.
    """
    if not config.uses_teacher:
        raise ValueError("dskd.kd_ratio is 0: this run uses no teacher, so there is no pair.")
    whole = config
    number, name, config = whole.choose(teacher)
    if probe_count:
        check_quantised(config.one_teacher)
    progress("tokenizers")
    vocabularies = _vocabularies(cfg, config)
    tokenizers = vocabularies[0].tokenizer, vocabularies[1].tokenizer
    progress("rows")
    samples = sample_rows(cfg, config, tokenizers[0], count=rows, teacher=number)
    kept = [row for sample in samples for row in sample.rows]
    aligned = [(sample, [AlignedRow.of(row) for row in sample.rows]) for sample in samples]
    datasets = [Coverage.of(*dataset, *vocabularies) for dataset in aligned]
    coverage = sum(datasets, Coverage("all"))
    if not kept:
        raise ValueError(_nothing_kept(coverage, samples))
    progress("models")
    student = student_skeleton(cfg, tokenizers[0])
    asked = teacher_skeleton(config.one_teacher, card.device)
    names = str(cfg.base_model), config.one_teacher.base_model
    ours, theirs = (
        side_facts(model, tokenizer, name, kept, prefix, rate)
        for model, tokenizer, name, prefix, rate in zip(
            (student, asked), tokenizers, names, ("", "teacher_"), coverage.rates, strict=True
        )
    )
    facts = Facts(*tokenizers, (ours.vocabulary, theirs.vocabulary), coverage.share)
    objective = build_objective(config, facts, memory=card.memory, seed=0)
    remarks = [
        *_differing(coverage, samples),
        *side_remarks(ours, tokenizers[0], "student"),
        *side_remarks(theirs, tokenizers[1], "teacher"),
    ]
    if name:
        names_of_others = ", ".join(other for other in whole.each() if other != name)
        remarks.append(
            f"Rows and tokenizers here are those of the teacher {name}, the memory is that of all "
            f"teachers; `--teacher` shows another: {names_of_others}."
        )
    progress("memory")
    others = [
        _other(cfg, one, card, tokenizers[0], rows, k, other)
        for k, (other, one) in enumerate(whole.each().items())
        if k != number
    ]
    setup = Setup(cfg, config, card, samples, facts, name, others)
    memory = memory_report(setup, student, asked)
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


def _other(
    cfg: Any, config: DSKDConfig, card: Card, student: Any, rows: int, number: int, name: str
) -> tuple[Setup, Any]:
    """Another teacher of the run, as far as its memory depends on it, and its skeleton."""
    with about_teacher(name):
        samples = sample_rows(cfg, config, student, count=rows, teacher=number)
        if not any(sample.rows for sample in samples):
            raise ValueError("none of the sampled rows asks this teacher. Sample more with --rows.")
        tokenizer = load_teacher_tokenizer(config)
        sizes = vocabulary_size(student), vocabulary_size(tokenizer)
        aligned = [AlignedRow.of(row) for sample in samples for row in sample.rows]
        paired = sum(row.exact for row in aligned)
        share = paired / max(1, sum(len(row.student) for row in aligned))
        facts = Facts(student, tokenizer, sizes, share)
        skeleton = teacher_skeleton(config.one_teacher, card.device)
    return Setup(cfg, config, card, samples, facts, name), skeleton


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
