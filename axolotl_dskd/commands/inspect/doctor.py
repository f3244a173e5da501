"""From a configuration to its report: joins sample, pair, skeletons and plan.

Loads tokenizers, model configs and a sample of rows; no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from axolotl.loaders import load_tokenizer

from axolotl_dskd.commands.inspect.card import Card
from axolotl_dskd.commands.inspect.fit import Run, memory_report, supervised
from axolotl_dskd.commands.inspect.probe import check_quantised, probe, probe_rows
from axolotl_dskd.commands.inspect.report import (
    Coverage,
    Report,
    SideFacts,
    cover,
    pick_examples,
)
from axolotl_dskd.commands.inspect.sample import OUTCOMES, REMEDIES, DatasetSample, sample_rows
from axolotl_dskd.commands.inspect.skeleton import (
    student_skeleton,
    teacher_skeleton,
    trained_tensors,
)
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data import (
    load_teacher_tokenizer,
    resolve_alignment,
    shared_tokens,
    vocabulary_size,
)
from axolotl_dskd.data.reconcile import DIFFERENT, MAX_DIFFERING_SHARE
from axolotl_dskd.data.token_bytes import normalisations, token_bytes
from axolotl_dskd.models.heads import output_head
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
    try:
        student_tokenizer = load_tokenizer(cfg)
    except (OSError, KeyError) as error:
        raise ValueError(
            "the student's tokenizer cannot be loaded from "
            f"{cfg.tokenizer_config or cfg.base_model!r}: {error}"
        ) from error
    teacher_tokenizer = load_teacher_tokenizer(config)
    tokenizers = student_tokenizer, teacher_tokenizer
    tables = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    progress("rows")
    samples = sample_rows(cfg, config, student_tokenizer, count=rows)
    found = [cover(sample, *tables) for sample in samples]
    coverage = Coverage("all")
    for part, _ in found:
        coverage.add(part)
    if not coverage.kept:
        raise ValueError(_nothing_kept(coverage, samples))
    progress("models")
    student = student_skeleton(cfg, student_tokenizer)
    teacher = teacher_skeleton(config.teacher, card.device)
    facts = (
        _side(cfg.base_model, student, student_tokenizer),
        _side(config.teacher.base_model, teacher, teacher_tokenizer),
    )
    _side_of_rows(facts[0], samples, tokenizers[0], "")
    _side_of_rows(facts[1], samples, tokenizers[1], "teacher_")
    facts[0].tokens_per_byte = coverage.student_tokens / max(1, coverage.text_bytes)
    facts[1].tokens_per_byte = coverage.teacher_tokens / max(1, coverage.teacher_bytes)
    shared = len(shared_tokens(*tokenizers)[0])
    alignment, why = resolve_alignment(config, *tokenizers, coverage.share)
    automatic = config.model_copy(update={"alignment": "auto"})
    recommended, recommended_why = resolve_alignment(automatic, *tokenizers, coverage.share)
    progress("memory")
    run = Run(cfg, config, card, samples, alignment, shared, tokenizers, facts[1].hidden_size)
    memory = memory_report(run, student, teacher)
    fidelity = None
    if probe_count:
        chosen = probe_rows([row for sample in samples for row in sample.rows], probe_count)
        device = torch.device("cuda" if torch.cuda.is_available() and card.gpu else "cpu")
        found_of = probe(config.teacher, chosen, facts[1].vocabulary, device, progress)
        fidelity = found_of.words("4 bits" if config.teacher.load_in_4bit else "8 bits")
    return Report(
        config=path,
        student=facts[0],
        teacher=facts[1],
        shared_tokens=shared,
        alignment=alignment,
        alignment_why=why,
        recommended=recommended,
        recommended_why=recommended_why,
        coverage=coverage,
        datasets=[part for part, _ in found],
        examples=pick_examples(samples, [groups for _, groups in found], tables, tokenizers),
        memory=memory,
        remarks=[
            *_differing(coverage, samples),
            *_normalising(tokenizers),
            *_remarks(facts, coverage, recommended, alignment),
        ],
        probe=fidelity,
    )


def _nothing_kept(coverage: Coverage, samples: Sequence[DatasetSample]) -> str:
    lines = [f"none of the {coverage.sampled} sampled rows would be trained on."]
    lines += [
        f"{count} {OUTCOMES[outcome]}; {REMEDIES[outcome]}."
        for outcome, count in coverage.outcomes.items()
        if count
    ]
    return "\n".join([*lines, *(line for sample in samples for line in sample.differing[:3])])


def _differing(coverage: Coverage, samples: Sequence[DatasetSample]) -> list[str]:
    """What training will say of rows whose two sides spell different texts, or nothing."""
    count, seen = coverage.outcomes.get(DIFFERENT, 0), sum(coverage.outcomes.values())
    if count <= MAX_DIFFERING_SHARE * seen:
        return []
    examples = [line for sample in samples for line in sample.differing][:3]
    return [
        f"Training will stop: {count} of {seen} sampled rows do not have the same supervised text "
        f"for student and teacher, more than {MAX_DIFFERING_SHARE:.0%}; {REMEDIES[DIFFERENT]}.\n"
        + "\n".join(examples)
    ]


def _normalising(tokenizers: tuple[Any, Any]) -> list[str]:
    """Which tokenizer changes a text before it splits it."""
    return [
        f"The {side}'s tokenizer changes text before it splits it ({', '.join(changes)}): rows "
        "that this changes are dropped."
        for side, tokenizer in zip(("student", "teacher"), tokenizers, strict=True)
        if (changes := normalisations(tokenizer))
    ]


def _side(name: str, model: Any, tokenizer: Any) -> SideFacts:
    head = output_head(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
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
    )


def _side_of_rows(
    facts: SideFacts, samples: Sequence[DatasetSample], tokenizer: Any, prefix: str
) -> None:
    """What the rows show of a side: BOS, the token that ends a turn, the prompt's form."""
    rows = [row for sample in samples for row in sample.rows]
    ids, labels = f"{prefix}input_ids", f"{prefix}labels"
    if tokenizer.bos_token_id is not None:
        facts.begins_with_bos = all(row[ids][0] == tokenizer.bos_token_id for row in rows)
    ends = {supervised(row[labels])[-1] for row in rows if supervised(row[labels])}
    if len(ends) == 1:
        facts.turn_end = str(tokenizer.convert_ids_to_tokens(ends.pop()))
    first = next(i for i, label in enumerate(rows[0][labels]) if label != IGNORE_INDEX)
    facts.prompt = tokenizer.decode(rows[0][ids][:first])


def _remarks(
    facts: tuple[SideFacts, SideFacts], coverage: Coverage, recommended: str, alignment: str
) -> list[str]:
    """What deserves attention, in words."""
    said = []
    for facts_of, name in zip(facts, ("student", "teacher"), strict=True):
        if facts_of.padding_rows:
            said.append(
                f"The {name}'s output head has {facts_of.padding_rows:,} rows more than its "
                "tokenizer has ids; they get no probability."
            )
        if facts_of.head_rows < facts_of.vocabulary:
            said.append(
                f"The {name}'s tokenizer has ids up to {facts_of.vocabulary - 1}, but its output "
                f"head only {facts_of.head_rows} rows: training will refuse this pair."
            )
    if facts[0].begins_with_bos != facts[1].begins_with_bos:
        one, other = ("student", "teacher") if facts[0].begins_with_bos else ("teacher", "student")
        said.append(
            f"The {one}'s rows begin with BOS, the {other}'s do not: no harm, not supervised."
        )
    dropped = sum(
        rows for outcome, rows in coverage.outcomes.items() if outcome not in ("kept", "cut")
    )
    if dropped:
        seen = sum(coverage.outcomes.values())
        said.append(f"{dropped} of {seen} sampled rows would not be trained on; see the datasets.")
    if recommended != alignment:
        said.append(
            f"The configuration says alignment: {alignment}; auto would take {recommended}."
        )
    return said
