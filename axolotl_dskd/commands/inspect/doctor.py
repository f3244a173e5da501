"""From a configuration to its report: joins sample, rows, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.fit import Setup, memory_report
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.rows import Coverage, Vocabulary, pick_examples
from axolotl_dskd.commands.inspect.sample import sample_rows
from axolotl_dskd.commands.inspect.sides import side_facts, side_remarks
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.outcomes import refusal
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
        check_quantised(config.teacher)
    progress("tokenizers")
    tokenizers = _student_tokenizer(cfg), load_teacher_tokenizer(config)
    ours, theirs = (Vocabulary(tokenizer, token_bytes(tokenizer)) for tokenizer in tokenizers)
    progress("rows")
    samples = sample_rows(cfg, config, tokenizers[0], count=rows)
    kept = [row for sample in samples for row in sample.rows]
    datasets = [sample.coverage for sample in samples]
    coverage = sum(datasets, Coverage("all"))
    why = refusal(coverage.outcomes, [text for sample in samples for text in sample.differing])
    if not kept:
        raise ValueError(why)
    progress("models")
    skeletons = student_skeleton(cfg, tokenizers[0]), teacher_skeleton(config.teacher, card.device)
    names, prefixes = (str(cfg.base_model), config.teacher.base_model), ("", "teacher_")
    student, teacher = (
        side_facts(model, tokenizer, name, kept, prefix)
        for model, tokenizer, name, prefix in zip(
            skeletons, tokenizers, names, prefixes, strict=True
        )
    )
    remarks = [
        *([f"Training will stop: {why}"] if why else []),
        *side_remarks(student, tokenizers[0], "student"),
        *side_remarks(teacher, tokenizers[1], "teacher"),
    ]
    facts = Facts(*tokenizers, (student.vocabulary, teacher.vocabulary), coverage.share)
    objective = build_objective(config, facts, memory=card.memory, seed=0)
    progress("memory")
    memory = memory_report(Setup(cfg, config, card, samples, facts), *skeletons)
    probed = None
    if probe_count:
        some = probe_rows(kept, probe_count)
        probed = probe(config.teacher, some, teacher.vocabulary, card.here, progress).words
    return Report(
        config=path,
        student=student,
        teacher=teacher,
        shared_tokens=len(shared_tokens(*tokenizers)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=coverage,
        datasets=datasets,
        examples=pick_examples(((s.coverage.name, s.aligned) for s in samples), ours, theirs),
        memory=memory,
        remarks=remarks,
        probe=probed,
    )


def _student_tokenizer(cfg: Any) -> Any:
    try:
        return load_tokenizer(cfg)
    except (OSError, KeyError) as error:
        raise ValueError(
            "the student's tokenizer cannot be loaded from "
            f"{cfg.tokenizer_config or cfg.base_model!r}: {error}"
        ) from error
