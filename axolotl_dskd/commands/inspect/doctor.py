"""From a configuration to its report: joins sample, rows, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.fit import Setup, memory_report
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import Report, SideFacts
from axolotl_dskd.commands.inspect.rows import (
    AlignedRow,
    Coverage,
    Example,
    Vocabulary,
    pick_examples,
    supervised,
)
from axolotl_dskd.commands.inspect.sample import OUTCOMES, REMEDIES, DatasetSample, sample_rows
from axolotl_dskd.commands.inspect.skeleton import (
    student_skeleton,
    teacher_skeleton,
    trained_tensors,
)
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.reconcile import CUT, DIFFERENT, KEPT, MAX_DIFFERING_SHARE
from axolotl_dskd.data.token_bytes import normalisations, shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.types import IGNORE_INDEX

Progress = Callable[[str], None]


def inspect_run(
    path: str,
    cfg: Any,
    config: DSKDConfig,
    *,
    card: Card,
    rows: int,
    probe_count: int | None = None,
    progress: Progress = lambda _: None,
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
    vocabularies = _vocabularies(cfg, config)
    progress("rows")
    data = _sampled(cfg, config, vocabularies, rows)
    progress("models")
    student, teacher = _models(cfg, config, card, vocabularies, data)
    tokenizers = student.vocabulary.tokenizer, teacher.vocabulary.tokenizer
    sizes = vocabulary_size(tokenizers[0]), vocabulary_size(tokenizers[1])
    facts = Facts(*tokenizers, sizes, data.coverage.share)
    objective = build_objective(config, facts, memory=card.memory, seed=0)
    progress("memory")
    setup = Setup(cfg, config, card, data.samples, facts, teacher.facts.hidden_size)
    memory = memory_report(setup, student.skeleton, teacher.skeleton)
    fidelity = _probe(config, teacher, data, probe_count, card, progress) if probe_count else None
    return Report(
        config=path,
        student=student.facts,
        teacher=teacher.facts,
        shared_tokens=len(shared_tokens(*tokenizers)[0]),
        objective=objective.describe(),
        advice=objective.advice(),
        coverage=data.coverage,
        datasets=data.datasets,
        examples=data.examples,
        memory=memory,
        remarks=list(_remarks(student, teacher, data)),
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


@dataclass(frozen=True)
class _Data:
    """The sampled rows of all datasets, and how the two sides meet in them."""

    samples: Sequence[DatasetSample]
    datasets: list[Coverage]
    coverage: Coverage
    examples: list[Example]

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """Those that would be trained on."""
        return [row for sample in self.samples for row in sample.rows]

    @property
    def differing(self) -> list[str]:
        """Both texts of some rows whose sides differ."""
        return [line for sample in self.samples for line in sample.differing]


def _sampled(
    cfg: Any, config: DSKDConfig, vocabularies: tuple[Vocabulary, Vocabulary], count: int
) -> _Data:
    samples = sample_rows(cfg, config, vocabularies[0].tokenizer, count=count)
    aligned = [(sample.name, list(map(AlignedRow.of, sample.rows))) for sample in samples]
    datasets = [
        Coverage(s.name, s.total, s.sampled, s.kept, dict(s.outcomes)).with_rows(
            rows, *vocabularies
        )
        for s, (_, rows) in zip(samples, aligned, strict=True)
    ]
    coverage = sum(datasets, Coverage("all"))
    data = _Data(samples, datasets, coverage, pick_examples(aligned, *vocabularies))
    if not coverage.kept:
        outcomes = [
            f"{count} {OUTCOMES[outcome]}; {REMEDIES[outcome]}."
            for outcome, count in coverage.outcomes.items()
            if count
        ]
        first = f"none of the {coverage.sampled} sampled rows would be trained on."
        raise ValueError("\n".join([first, *outcomes, *data.differing]))
    return data


@dataclass(frozen=True)
class _Model:
    """One of the two models, as far as it is known without its weights."""

    vocabulary: Vocabulary
    skeleton: Any
    facts: SideFacts


def _models(
    cfg: Any,
    config: DSKDConfig,
    card: Card,
    vocabularies: tuple[Vocabulary, Vocabulary],
    data: _Data,
) -> tuple[_Model, _Model]:
    student, teacher = vocabularies
    coverage = data.coverage
    ours = [(row["input_ids"], row["labels"]) for row in data.rows]
    theirs = [(row["teacher_input_ids"], row["teacher_labels"]) for row in data.rows]
    rate = coverage.student_tokens / max(1, coverage.text_bytes)
    teacher_rate = coverage.teacher_tokens / max(1, coverage.teacher_bytes)
    skeleton = student_skeleton(cfg, student.tokenizer)
    facts = _facts(cfg.base_model, skeleton, student.tokenizer, ours, rate)
    teacher_model = teacher_skeleton(config.teacher, card.device)
    teacher_facts = _facts(
        config.teacher.base_model, teacher_model, teacher.tokenizer, theirs, teacher_rate
    )
    return _Model(student, skeleton, facts), _Model(teacher, teacher_model, teacher_facts)


def _facts(
    name: str, model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], list[int]]], rate: float
) -> SideFacts:
    """What is said of a model, from its skeleton and the (ids, labels) of its side of the rows."""
    head = output_head(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    bos = tokenizer.bos_token_id
    ends = {tokens[-1] for _, labels in rows if (tokens := supervised(labels))}
    ids, labels = rows[0]
    prompt = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    return SideFacts(
        name=str(name),
        architecture=type(base).__name__,
        tokenizer=tokenizer.name_or_path or type(tokenizer).__name__,
        vocabulary=vocabulary_size(tokenizer),
        head_rows=head.weight.shape[0],
        hidden_size=head.hidden_size,
        parameters=sum(p.numel() for p in model.parameters() if id(p) not in lora),
        trained=sum(p.numel() for p in trained_tensors(model)),
        tied=getattr(embedding, "weight", None) is getattr(output, "weight", embedding),
        softcap=head.softcap,
        scale=head.scale,
        bias=head.bias is not None,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
        begins_with_bos=bos is not None and all(ids[0] == bos for ids, _ in rows),
        turn_end=str(tokenizer.convert_ids_to_tokens(ends.pop())) if len(ends) == 1 else None,
        tokens_per_byte=rate,
        prompt=tokenizer.decode(ids[:prompt]),
    )


def _probe(
    config: DSKDConfig, teacher: _Model, data: _Data, count: int, card: Card, progress: Progress
) -> str:
    """What quantising the teacher changes, in words."""
    device = torch.device("cuda" if torch.cuda.is_available() and card.gpu else "cpu")
    rows = probe_rows(data.rows, count)
    result = probe(config.teacher, rows, teacher.facts.vocabulary, device, progress)
    return result.words("4 bits" if config.teacher.load_in_4bit else "8 bits")


def _remarks(student: _Model, teacher: _Model, data: _Data) -> Iterator[str]:
    """What deserves attention, in words."""
    models = {"student": student, "teacher": teacher}
    outcomes = data.coverage.outcomes
    seen, differing = sum(outcomes.values()), outcomes.get(DIFFERENT, 0)
    if differing > MAX_DIFFERING_SHARE * seen:
        yield (
            f"Training will stop: {differing} of {seen} sampled rows do not have the same "
            f"supervised text for student and teacher, more than {MAX_DIFFERING_SHARE:.0%}; "
            f"{REMEDIES[DIFFERENT]}.\n" + "\n".join(data.differing[:3])
        )
    for name, model in models.items():
        if changes := normalisations(model.vocabulary.tokenizer):
            yield (
                f"The {name}'s tokenizer changes text before it splits it ({', '.join(changes)}): "
                "rows that this changes are dropped."
            )
    for name, facts in ((name, model.facts) for name, model in models.items()):
        if facts.padding_rows:
            yield (
                f"The {name}'s output head has {facts.padding_rows:,} rows more than its "
                "tokenizer has ids; they get no probability."
            )
        if facts.head_rows < facts.vocabulary:
            yield (
                f"The {name}'s tokenizer has ids up to {facts.vocabulary - 1}, but its output "
                f"head only {facts.head_rows} rows: training will refuse this pair."
            )
    if student.facts.begins_with_bos != teacher.facts.begins_with_bos:
        with_bos, without = models if student.facts.begins_with_bos else reversed(models)
        yield (
            f"The {with_bos}'s rows begin with BOS, the {without}'s do not: no harm, not "
            "supervised."
        )
    if dropped := seen - outcomes.get(KEPT, 0) - outcomes.get(CUT, 0):
        yield f"{dropped} of {seen} sampled rows would not be trained on; see the datasets."
