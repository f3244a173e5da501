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
    Vocabulary,
    pick_examples,
    supervised,
)
from axolotl_dskd.commands.inspect.sample import OUTCOMES, REMEDIES, DatasetSample, sample_rows
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.reconcile import CUT, DIFFERENT, KEPT, MAX_DIFFERING_SHARE
from axolotl_dskd.data.token_bytes import normalisations, shared_tokens, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.objectives import Facts, build_objective
from axolotl_dskd.planning import skeleton
from axolotl_dskd.types import IGNORE_INDEX


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
    student = _Model(skeleton.student_skeleton(cfg, tokenizers[0]), tokenizers[0])
    teacher = _Model(skeleton.teacher_skeleton(config.teacher, card.device), tokenizers[1])
    ours = student.facts(cfg.base_model, kept, "", coverage.rates[0])
    theirs = teacher.facts(config.teacher.base_model, kept, "teacher_", coverage.rates[1])
    facts = Facts(*tokenizers, (ours.vocabulary, theirs.vocabulary), coverage.share)
    objective = build_objective(config, facts, memory=card.memory, seed=0)
    remarks = [*_differing(coverage, samples), *student.remarks(ours, "student")]
    remarks += [*teacher.remarks(theirs, "teacher"), *_remarks(ours, theirs, coverage)]
    progress("memory")
    setup = Setup(cfg, config, card, samples, facts, theirs.hidden_size)
    memory = memory_report(setup, student.skeleton, teacher.skeleton)
    fidelity = None
    if probe_count:
        device = torch.device("cuda" if torch.cuda.is_available() and card.gpu else "cpu")
        probed = probe_rows(kept, probe_count)
        result = probe(config.teacher, probed, theirs.vocabulary, device, progress)
        fidelity = result.words("4 bits" if config.teacher.load_in_4bit else "8 bits")
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


@dataclass(frozen=True)
class _Model:
    """One of the two models, as far as it is known without its weights."""

    skeleton: Any
    tokenizer: Any

    def facts(
        self, name: str, rows: Sequence[dict[str, list[int]]], prefix: str, rate: float
    ) -> SideFacts:
        """What is said of it.

        Args:
            rows: prepared ones, whose columns of this side begin with `prefix`.
            rate: its supervised tokens per byte.
        """
        model, tokenizer, head = self.skeleton, self.tokenizer, output_head(self.skeleton)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
        ids, labels = ([row[prefix + c] for row in rows] for c in ("input_ids", "labels"))
        bos = tokenizer.bos_token_id
        ends = {tokens[-1] for row in labels if (tokens := supervised(row))}
        prompt = next(i for i, label in enumerate(labels[0]) if label != IGNORE_INDEX)
        return SideFacts(
            name=str(name),
            architecture=type(base).__name__,
            tokenizer=tokenizer.name_or_path or type(tokenizer).__name__,
            vocabulary=vocabulary_size(tokenizer),
            head_rows=head.weight.shape[0],
            hidden_size=head.hidden_size,
            parameters=sum(p.numel() for p in model.parameters() if id(p) not in lora),
            trained=sum(p.numel() for p in skeleton.trained_tensors(model)),
            tied=getattr(embedding, "weight", None) is getattr(output, "weight", embedding),
            softcap=head.softcap,
            scale=head.scale,
            bias=head.bias is not None,
            bos=tokenizer.bos_token,
            eos=tokenizer.eos_token,
            begins_with_bos=bos is not None and all(row[0] == bos for row in ids),
            turn_end=str(tokenizer.convert_ids_to_tokens(ends.pop())) if len(ends) == 1 else None,
            tokens_per_byte=rate,
            prompt=tokenizer.decode(ids[0][:prompt]),
        )

    def remarks(self, facts: SideFacts, name: str) -> Iterator[str]:
        """What deserves attention, in words."""
        if changes := normalisations(self.tokenizer):
            yield (
                f"The {name}'s tokenizer changes text before it splits it ({', '.join(changes)}): "
                "rows that this changes are dropped."
            )
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


def _remarks(student: SideFacts, teacher: SideFacts, coverage: Coverage) -> Iterator[str]:
    """What deserves attention in how the two meet, in words."""
    if student.begins_with_bos != teacher.begins_with_bos:
        names = ("student", "teacher") if student.begins_with_bos else ("teacher", "student")
        yield "The {}'s rows begin with BOS, the {}'s do not: no harm, not supervised.".format(
            *names
        )
    seen, dropped = (
        sum(n for outcome, n in coverage.outcomes.items() if outcome not in left_out)
        for left_out in ((), (KEPT, CUT))
    )
    if dropped:
        yield f"{dropped} of {seen} sampled rows would not be trained on; see the datasets."
