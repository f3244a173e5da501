"""From a configuration to its report: joins sample, rows, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.fit import Setup, memory_report
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.rows import Coverage, Vocabulary, pick_examples
from axolotl_dskd.commands.inspect.sample import sample_rows
from axolotl_dskd.commands.inspect.sides import side_facts, side_remarks
from axolotl_dskd.config import DSKDConfig, about_teacher
from axolotl_dskd.data.outcomes import refusal
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.objectives import Facts
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
    if not config.opens_teacher:
        raise ValueError(
            "dskd.kd_ratio is 0: this run uses no teacher, so there is no pair. With evaluation: "
            "{teacher: true} evaluations would."
        )
    whole = config
    number, name, config = whole.choose(teacher)
    if probe_count:
        check_quantised(config.one_teacher)
    progress("tokenizers")
    tokenizers = _student_tokenizer(cfg), load_teacher_tokenizer(config)
    vocabularies = [Vocabulary(tokenizer, token_bytes(tokenizer)) for tokenizer in tokenizers]
    progress("rows")
    samples = sample_rows(cfg, config, tokenizers[0], count=rows, teacher=number)
    kept = [row for sample in samples for row in sample.rows]
    datasets = [sample.coverage for sample in samples]
    coverage = sum(datasets, Coverage("all"))
    why = refusal(coverage.outcomes, [text for sample in samples for text in sample.differing])
    if not kept:
        raise ValueError(why)
    progress("models")
    loaded = config.one_teacher
    skeletons = student_skeleton(cfg, tokenizers[0]), teacher_skeleton(loaded, card.device)
    names, prefixes = (str(cfg.base_model), loaded.base_model), ("", "teacher_")
    ours, theirs = (
        side_facts(model, tokenizer, name, kept, prefix)
        for model, tokenizer, name, prefix in zip(
            skeletons, tokenizers, names, prefixes, strict=True
        )
    )
    remarks = [
        *([f"Training will stop: {why}"] if why else []),
        *side_remarks(ours, tokenizers[0], "student"),
        *side_remarks(theirs, tokenizers[1], "teacher"),
    ]
    if name:
        names_of_others = ", ".join(other for other in whole.each() if other != name)
        remarks.append(
            f"Rows and tokenizers here are those of the teacher {name}, the memory is that of all "
            f"teachers; `--teacher` shows another: {names_of_others}."
        )
    facts = Facts(*tokenizers, (ours.vocabulary, theirs.vocabulary), coverage.share)
    setup = Setup(cfg, config, card, samples, facts, name)
    objective = setup.objective()
    progress("memory")
    others = [
        _other(setup, rows, k, other, one)
        for k, (other, one) in enumerate(whole.each().items())
        if k != number
    ]
    memory = memory_report(replace(setup, others=others), *skeletons)
    probed = None
    if probe_count:
        some = probe_rows(kept, probe_count)
        probed = probe(loaded, some, theirs.vocabulary, card.here, progress).words
    return Report(
        config=path,
        student=ours,
        teacher=theirs,
        shared_tokens=len(shared_tokens(*tokenizers)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=coverage,
        datasets=datasets,
        examples=pick_examples(((s.coverage.name, s.aligned) for s in samples), *vocabularies),
        memory=memory,
        remarks=remarks,
        probe=probed,
    )


def _other(
    asked: Setup, rows: int, number: int, name: str, config: DSKDConfig
) -> tuple[Setup, Any]:
    """Another teacher of the run, as far as its memory depends on it, and its skeleton.

    Args:
        asked: of the teacher that is looked at.
        rows: sampled of each dataset.
        number, name, config: of the other teacher.
    """
    student = asked.facts.student
    with about_teacher(name):
        samples = sample_rows(asked.cfg, config, student, count=rows, teacher=number)
        coverage = sum((sample.coverage for sample in samples), Coverage(name))
        if not coverage.kept:
            raise ValueError("none of the sampled rows asks this teacher. Sample more with --rows.")
        tokenizer = load_teacher_tokenizer(config)
        sizes = vocabulary_size(student), vocabulary_size(tokenizer)
        facts = Facts(student, tokenizer, sizes, coverage.share)
        skeleton = teacher_skeleton(config.one_teacher, asked.card.device)
    return replace(asked, config=config, samples=samples, facts=facts, name=name), skeleton


def _student_tokenizer(cfg: Any) -> Any:
    try:
        return load_tokenizer(cfg)
    except (OSError, KeyError) as error:
        raise ValueError(
            "the student's tokenizer cannot be loaded from "
            f"{cfg.tokenizer_config or cfg.base_model!r}: {error}"
        ) from error
