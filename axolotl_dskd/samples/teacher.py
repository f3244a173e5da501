"""Sequence-level distillation: rows whose answers the teacher has written (Kim & Rush 2016,
arXiv 1606.07947), once for all runs with this teacher and these prompts.

A teacher's answer is a reference, as the data set's own is: all that an objective does with rows
of data it does with these.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from axolotl.utils.logging import get_logger
from datasets import concatenate_datasets
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from axolotl_dskd.cache import write_atomically
from axolotl_dskd.config import TeacherSamplesConfig
from axolotl_dskd.data.answers import AnsweredRows, Prompt
from axolotl_dskd.data.collator import fill_columns
from axolotl_dskd.data.routing import in_their_places, rows_of_teacher
from axolotl_dskd.generation import Answer, Sampling, prompt_seed
from axolotl_dskd.ranks import gather_objects, max_over_ranks, raise_together
from axolotl_dskd.samples.base import Batch, Samples, SamplesRun
from axolotl_dskd.samples.tally import Tally

LOG = get_logger(__name__)

#: Prompts whose answers are written to one file: what a killed run loses at most.
_AT_ONCE = 256
#: Rows that are changed at once: as lists of numbers they take many times their memory.
_ROWS = 128
#: How long files of other ranks may take to show.
_LATE_SECONDS = 60.0
_SUFFIX = ".safetensors"


class TeacherSamples(Samples):
    """See the module.

    Args:
        config: its keys.
        run: the training.
    """

    def __init__(self, config: TeacherSamplesConfig, run: SamplesRun) -> None:
        self.config = config
        self.run = run

    def __call__(self, batches: list[Batch], step: int) -> list[Batch]:
        """See `Samples`: the rows are answered already."""
        return batches

    def dataset(self, rows: Any) -> Any:
        """The rows with their teachers' answers; a teacher that no row asks writes nothing.

        Raises:
            ValueError: see `TeacherAnswers`.
        """
        if not self.run.by_teacher:
            return TeacherAnswers(self.config, self.run)(rows)
        parts = [rows_of_teacher(rows, number) for number in range(len(self.run.by_teacher))]
        answered = [
            TeacherAnswers(self.config, run)(part) if len(part) else part
            for run, part in zip(self.run.by_teacher, parts, strict=True)
        ]
        return in_their_places(answered, rows)


class _Asked(NamedTuple):
    """A prompt: the first of the rows that have it, and how many of the teacher's tokens it has."""

    row: int
    length: int


class _Kept(NamedTuple):
    """An answer as it stands in a file: `Answer.ids` as int32, 4 bytes a token, and `ended`."""

    ids: torch.Tensor
    ended: bool


class TeacherAnswers:
    """What one teacher answers to the prompts of rows.

    Args:
        config: how it writes.
        run: the training, with this teacher alone.
    """

    def __init__(self, config: TeacherSamplesConfig, run: SamplesRun) -> None:
        self.config = config
        self.run = run
        answered = run.answered()
        assert isinstance(answered, AnsweredRows), "one teacher at a time"
        self.answered = answered
        self.tally = Tally()

    def __call__(self, rows: Any) -> Any:
        """The rows with the teacher's answers; one whose answer cannot be used stays as it is.

        Raises:
            ValueError: no row has a prompt; no answer can be used.
        """
        # By number: the prompts of a large data set would take many times its memory as lists.
        keys: list[int | None] = []
        asked: dict[int, _Asked] = {}
        for index, row in enumerate(rows):
            prompt = self.answered.prompt(row)
            if prompt is None:
                keys.append(None)
                continue
            ids = prompt["teacher"].ids
            key = prompt_seed(ids, self.config.seed)
            keys.append(key)
            asked.setdefault(key, _Asked(index, len(ids)))
        answers = self._answers(rows, asked)
        known = ("attention_mask", "position_ids", "length")
        columns = [name for name in rows.column_names if name in known]

        def answer(row: dict[str, Any], key: int | None) -> dict[str, Any]:
            made: dict[str, Any] | str = "no prompt"
            if key is not None:
                found, prompt = answers[key], self._prompt(row)
                made = self.answered.row(
                    prompt, found.ids.tolist(), ended=found.ended, by="teacher"
                )
            if not isinstance(made, str) and len(made["input_ids"]) > self.run.max_length:
                made = "student too long"
            if isinstance(made, str):
                self.tally.refused[made] += 1
                return {}
            fill_columns(made, columns)
            return made

        if not answers:
            raise ValueError(
                "dskd.samples.from: teacher: no row has a supervised answer with a prompt before "
                "it. Use rows of questions and answers, or samples: dataset."
            )
        names = list(rows.column_names)
        parts = []
        for start in range(0, len(rows), _ROWS):
            few = rows.select(range(start, min(start + _ROWS, len(rows))))
            theirs = zip(few, keys[start : start + _ROWS], strict=True)
            changed = [{**row, **answer(row, key)} for row, key in theirs]
            made = {name: [row[name] for row in changed] for name in names}
            parts.append(type(rows).from_dict(made, features=rows.features))
        refused = sum(self.tally.refused.values())
        (LOG.warning if refused else LOG.info)(
            f"The teacher has answered {len(rows) - refused} of {len(rows)} rows"
            + (f"; the data's own answers stay in {dict(self.tally.refused)}" if refused else "")
        )
        if refused == len(rows):
            raise ValueError(
                f"dskd.samples.from: teacher: none of its answers can be used "
                f"({dict(self.tally.refused)}). Check max_new_tokens against sequence_len."
            )
        return concatenate_datasets(parts)

    def _prompt(self, row: dict[str, Any]) -> Prompt:
        """Of a row that has one."""
        prompt = self.answered.prompt(row)
        assert prompt is not None
        return prompt

    # ---- the answers -------------------------------------------------------------------------

    def _answers(self, rows: Any, asked: dict[int, _Asked]) -> dict[int, _Kept]:
        """An answer to each prompt, read where it was written before, else written now."""
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        known = _read(folder, _names(folder))
        # On any rank: not every machine may see what another one has written.
        lacking = gather_objects(asked.keys() - known.keys())
        missing = sorted(set().union(*lacking))
        LOG.info(
            f"Answers of the teacher in {folder}: {len(asked) - len(missing):,} of "
            f"{len(asked):,} are written"
        )
        if missing:
            mine = missing[self.run.rank :: len(lacking)]
            self._write(folder, rows, {key: asked[key] for key in mine})
            gather_objects(0)  # all have written
        if missing or len(lacking) > 1:
            known = self._of_all_ranks(folder, asked)
        return {key: known[key] for key in asked}

    def _of_all_ranks(self, folder: Path, asked: dict[int, _Asked]) -> dict[int, _Kept]:
        """What is in the files that any rank sees now, once they show here, which may take a moment
        on a network's disk. Other runs may be writing; yet all ranks have the same answers.

        Raises:
            ValueError: on every rank, if they do not show on one.
        """
        names = set().union(*gather_objects(_names(folder)))
        until = time.monotonic() + _LATE_SECONDS
        while True:
            known = _read(folder, names)
            number = len(asked.keys() - known.keys())
            unseen = len(names - _names(folder))
            late = max(gather_objects((number + unseen, time.monotonic() > until)))
            if not late[0] or late[1]:
                break
            time.sleep(_LATE_SECONDS / 20)
        lack = f"{number} answers" if number else f"{unseen} files with answers"
        raise_together(
            f"{lack} of the teacher are not in {folder}, which other ranks have written. "
            "dataset_prepared_path must be one folder for all of them, as must "
            "dskd.teacher.cache.path."
            if number or unseen
            else None,
            self.run.device,
        )
        return known

    def _write(self, folder: Path, rows: Any, asked: dict[int, _Asked]) -> None:
        """Write this rank's share of the answers.

        Raises:
            ValueError: on every rank, if one cannot save what it has; what others have stays.
        """
        config = self.config
        ends = self.answered.end_ids["teacher"]
        writer = self.run.writer("teacher", ends, config.batch_tokens)
        sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            self.answered.reconcile.teacher_limit,
        )
        # Of similar length together.
        keys = sorted(asked, key=lambda key: (-asked[key].length, key))
        turns = max_over_ranks(-(-len(keys) // _AT_ONCE), self.run.device)
        for turn in range(turns):
            now = keys[turn * _AT_ONCE : (turn + 1) * _AT_ONCE]
            prompts = [self._prompt(rows[asked[key].row])["teacher"].ids for key in now]
            found = writer.write(prompts, sampling, now)
            problem = None
            try:
                if now:
                    _save(folder, dict(zip(now, found, strict=True)))
            except OSError as error:
                problem = (
                    f"the teacher's answers cannot be saved in {folder}: {error}. Make room, or "
                    "name another folder (dataset_prepared_path, dskd.teacher.cache.path): what is "
                    "saved is not written again."
                )
            raise_together(problem, self.run.device)
            LOG.info(f"The teacher has answered {(turn + 1) / turns:.0%} of what was missing")

    def _folder(self) -> Path:
        """Of these answers: what decides them is in its name."""
        decides = self.config.model_dump(exclude={"batch_tokens", "engine"})
        decides["teacher"] = self.run.identity()
        engine = self.config.engine
        if engine != "transformers" and engine.vllm.model is not None:
            # Under a name of its own a server may have an adapter or a fine-tune of the teacher.
            decides["served_as"] = engine.vllm.model
        decides["ends"] = self.answered.end_ids["teacher"]
        decides["limit"] = self.answered.reconcile.teacher_limit
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        return self.run.folder / f"dskd-answers-{digest}"


def _save(folder: Path, answers: dict[int, Answer]) -> None:
    """One file, which appears whole or not at all, and is never changed: its name tells its
    content, so runs that write side by side cannot take each other's place."""
    ids = [torch.tensor(answer.ids, dtype=torch.int32) for answer in answers.values()]
    content = save(
        {
            "keys": torch.tensor(list(answers)),
            "lengths": torch.tensor([len(row) for row in ids]),
            "ended": torch.tensor([answer.ended for answer in answers.values()]),
            "ids": torch.cat(ids),
        }
    )
    name = hashlib.sha256(content).hexdigest()[:16]
    write_atomically(folder / f"{name}{_SUFFIX}", [content])


def _names(folder: Path) -> set[str]:
    """Of the files in a folder."""
    return {path.name for path in folder.glob(f"*{_SUFFIX}")}


def _read(folder: Path, names: Iterable[str]) -> dict[int, _Kept]:
    """What is in some files of a folder, the same answers from the same files: of two to one prompt
    the first by name counts. A damaged file counts as not written, and so does one that is not
    there."""
    answers: dict[int, _Kept] = {}
    for path in (folder / name for name in sorted(names)):
        try:
            tensors = load_file(path)
        except FileNotFoundError:
            continue
        except (OSError, SafetensorError) as error:
            LOG.warning(f"{path} is damaged ({error}): its answers are written again")
            continue
        rows: Iterable[torch.Tensor] = tensors["ids"].split(tensors["lengths"].tolist())
        for key, ids, ended in zip(
            tensors["keys"].tolist(), rows, tensors["ended"].tolist(), strict=True
        ):
            answers.setdefault(key, _Kept(ids, ended))
    return answers
