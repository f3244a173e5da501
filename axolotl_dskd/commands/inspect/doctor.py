"""From a configuration to its report: joins sample, rows, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.fit import fit
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.rows import Coverage, Vocabulary, pick_examples
from axolotl_dskd.commands.inspect.sample import Sample, sample_rows
from axolotl_dskd.commands.inspect.sides import side_facts, side_remarks
from axolotl_dskd.config import DSKDConfig, about_teacher, loading
from axolotl_dskd.data.outcomes import refusal
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.objectives import Facts
from axolotl_dskd.planning.plan import Card, RowSize
from axolotl_dskd.planning.run import Run
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
    _, name, one = config.choose(teacher)
    if probe_count:
        check_quantised(one.one_teacher)
    progress("tokenizers")
    with loading(f"the student's tokenizer {cfg.tokenizer_config or cfg.base_model!r}"):
        tokenizer = load_tokenizer(cfg)
    runs, samples = {}, {}
    for number, (other, its) in enumerate(config.each().items()):
        progress(f"rows of {other}" if other else "rows")
        with about_teacher(other):
            samples[other] = sample_rows(cfg, its, tokenizer, count=rows, teacher=number)
            runs[other] = _run(cfg, its, card, tokenizer, samples[other], other)
    progress("models")
    run, sample = runs.pop(name), samples[name]
    student, facts = student_skeleton(cfg, tokenizer), run.facts
    coverage, kept = _together(sample), [row for part in sample for row in part.rows]
    sides = (
        side_facts(student, facts.student, str(cfg.base_model), kept, ""),
        side_facts(run.teacher, facts.teacher, one.one_teacher.base_model, kept, "teacher_"),
    )
    why = _refusal(sample)
    remarks = [
        *([f"Training will stop: {why}"] if why else []),
        *side_remarks(sides[0], facts.student, "student"),
        *side_remarks(sides[1], facts.teacher, "teacher"),
    ]
    if runs:
        remarks.append(
            f"Rows and tokenizers here are those of the teacher {name}, the memory is that of all "
            f"teachers; `--teacher` shows another: {', '.join(runs)}."
        )
    vocabularies = (Vocabulary(t, token_bytes(t)) for t in (facts.student, facts.teacher))
    objective = run.objective()
    progress("memory")
    parts = [part.coverage for part in sample]
    teacher_tokens = sum(p.teacher_tokens * p.total / max(1, p.sampled) for p in parts)
    memory = fit(student, [run, *runs.values()], teacher_tokens)
    probed = None
    if probe_count:
        some, size = probe_rows(kept, probe_count), facts.vocab_sizes[1]
        probed = probe(one.one_teacher, some, size, card.here, progress).words
    return Report(
        config=path,
        student=sides[0],
        teacher=sides[1],
        shared_tokens=len(shared_tokens(facts.student, facts.teacher)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=coverage,
        datasets=parts,
        examples=pick_examples(((p.coverage.name, p.aligned) for p in sample), *vocabularies),
        memory=memory,
        remarks=remarks,
        probe=probed,
    )


def _together(samples: Sequence[Sample]) -> Coverage:
    return sum((sample.coverage for sample in samples), Coverage("all"))


def _refusal(samples: Sequence[Sample]) -> str | None:
    texts = [text for sample in samples for text in sample.differing]
    return refusal(_together(samples).outcomes, texts)


def _run(
    cfg: Any, config: DSKDConfig, card: Card, student: Any, samples: Sequence[Sample], name: str
) -> Run:
    """What the plan with one of the teachers is made from.

    Args:
        student: its tokenizer.
        samples: of the teacher's rows.

    Raises:
        ValueError: there are none to train on, or the teacher cannot be loaded.
    """
    coverage = _together(samples)
    if not coverage.sampled:
        raise ValueError("none of the sampled rows asks this teacher. Sample more with --rows.")
    if not coverage.kept:
        raise ValueError(_refusal(samples))
    sizes = [
        RowSize(
            len(row["input_ids"]), len(a.student), len(row["teacher_input_ids"]), len(a.teacher)
        )
        for sample in samples
        for row, a in zip(sample.rows, sample.aligned, strict=True)
    ]
    tokenizer = load_teacher_tokenizer(config)
    vocabularies = vocabulary_size(student), vocabulary_size(tokenizer)
    facts = Facts(student, tokenizer, vocabularies, coverage.share)
    skeleton = teacher_skeleton(config.one_teacher, card.device)
    return Run(cfg, config, card, sizes, coverage.sampled == coverage.total, facts, skeleton, name)
