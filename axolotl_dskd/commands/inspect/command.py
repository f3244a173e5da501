"""The command itself: from a configuration to its report, and to terminal, page and file.

Joins sample, rows, skeletons and plan. Loads tokenizers, model configs and a sample of rows; no
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from axolotl.loaders import load_tokenizer
from rich.console import Console

from axolotl_dskd.commands.inspect.card import configured_for, find_card, parse_memory
from axolotl_dskd.commands.inspect.examples import pick_examples
from axolotl_dskd.commands.inspect.fit import fit
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.shown import html_page, print_report
from axolotl_dskd.commands.inspect.sides import side_facts
from axolotl_dskd.commands.sample import Sample, sample_rows
from axolotl_dskd.config import DSKDConfig, about_teacher, loading
from axolotl_dskd.data.byte_spans import BYTES_PER_TOKEN
from axolotl_dskd.data.outcomes import refusal
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.data.token_bytes import shared_tokens
from axolotl_dskd.data.tokenizers import ends_of, load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.objectives import Facts
from axolotl_dskd.planning.run import Card, RowSize, Run
from axolotl_dskd.planning.skeleton import student_skeleton


def run_inspect(
    read_config: Callable[[Path], tuple[Any, DSKDConfig]],
    config: Path,
    gpu_memory: str | None,
    html: Path | None,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Inspect a configuration; see the options of `axolotl-dskd inspect`.

    Args:
        options: further ones, for `inspect_run`.

    Raises:
        click.ClickException: the configuration or one of the options cannot be used, in words.
    """
    console = Console()
    try:
        card = find_card(parse_memory(gpu_memory) if gpu_memory else None)
        with configured_for(card):
            cfg, dskd = read_config(config)
        if not card.gpu and (cfg.bf16 or cfg.fp16):
            raise ValueError(
                f"{config} computes in {'bf16' if cfg.bf16 else 'fp16'}, which is for a GPU, and "
                "there is none here. Say which card to plan for, such as --gpu-memory 24GiB, or "
                "set bf16: false and fp16: false to train on this machine's CPU."
            )
        with console.status("tokenizers") as status:
            report = inspect_run(
                str(config), cfg, dskd, card=card, progress=status.update, **options
            )
        print_report(report, console)
        page = html or Path(cfg.output_dir) / "dskd-inspect.html"
        _write(page, html_page(report))
        console.print(f"The page with pictures: {page}", markup=False, highlight=False)
        if json_path is not None:
            _write(json_path, report.as_json())
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text of rows may hold lone surrogates, which no encoding takes.
    path.write_text(text, encoding="utf-8", errors="replace")


def inspect_run(
    path: str,
    cfg: Any,
    config: DSKDConfig,
    *,
    card: Card,
    rows: int,
    teacher: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """The report of one configuration.

    Args:
        path: of the configuration, for the report's title.
        cfg: Axolotl's validated configuration; `config`: its `dskd:` block.
        rows: sampled of each dataset.
        teacher: the name of the one to look at, where there are several.
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
    progress("tokenizers")
    with loading(f"the student's tokenizer {cfg.tokenizer_config or cfg.base_model!r}"):
        tokenizer = load_tokenizer(cfg)
    runs, samples = {}, {}  # of every teacher, by name
    for number, (other, its) in enumerate(config.each().items()):
        progress(f"rows of {other}" if other else "rows")
        with about_teacher(other):
            samples[other] = sample_rows(cfg, its, tokenizer, count=rows, teacher=number)
            runs[other] = _run(cfg, its, card, tokenizer, Sample.together(samples[other]), other)
    progress("models")
    run, datasets, whole = runs.pop(name), samples[name], Sample.together(samples[name])
    student, facts = student_skeleton(cfg, tokenizer), run.facts
    sides = (
        side_facts("student", student, facts.student, str(cfg.base_model), whole.rows),
        side_facts("teacher", run.teacher, facts.teacher, one.one_teacher.base_model, whole.rows),
    )
    why = refusal(whole.outcomes, whole.differing)
    remarks = [f"Training will stop: {why}"] if why else []
    remarks += sides[0].remarks + sides[1].remarks
    if runs:
        remarks.append(
            f"Rows and tokenizers here are those of the teacher {name}, the memory is that of all "
            f"teachers; `--teacher` shows another: {', '.join(runs)}."
        )
    objective = run.objective()
    progress("memory")
    teacher_tokens = sum(d.teacher_tokens * d.total / max(1, d.sampled) for d in datasets)
    memory = fit(student, [run, *runs.values()], teacher_tokens)
    return Report(
        config=path,
        student=sides[0],
        teacher=sides[1],
        shared_tokens=len(shared_tokens(facts.student, facts.teacher, facts.turn_ends)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=whole,
        datasets=datasets,
        examples=pick_examples(datasets, facts.student, facts.teacher),
        memory=memory,
        remarks=remarks,
    )


def _run(cfg: Any, config: DSKDConfig, card: Card, student: Any, sample: Sample, name: str) -> Run:
    """What the plan with one of the teachers is made from.

    Args:
        student: its tokenizer; `sample`: of the teacher's rows.

    Raises:
        ValueError: there are none to train on.
    """
    if not sample.sampled:
        raise ValueError("none of the sampled rows asks this teacher. Sample more with --rows.")
    if not sample.kept:
        raise ValueError(refusal(sample.outcomes, sample.differing))
    sizes = [
        RowSize(
            len(row["input_ids"]),
            len(row[SPANS]) // BYTES_PER_TOKEN,
            len(row["teacher_input_ids"]),
            len(row[TEACHER_SPANS]) // BYTES_PER_TOKEN,
        )
        for row in sample.rows
    ]
    tokenizer = load_teacher_tokenizer(config)
    vocabularies = vocabulary_size(student), vocabulary_size(tokenizer)
    ends = ends_of(sample.rows, student, tokenizer)
    facts = Facts(student, tokenizer, vocabularies, sample.share, turn_ends=ends)
    return Run(cfg, config, card, sizes, sample.sampled == sample.total, facts, name)
