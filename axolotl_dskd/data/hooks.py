"""Where Axolotl's supervised data pipeline is made to prepare both sides of a row.

Axolotl has no hook inside its pipeline, so three of its functions are wrapped, once per process.
Each wrapper passes straight through for a config without a `dskd:` block. With `kd_ratio: 0` rows
are prepared as for a distillation, so that plain fine-tuning can be compared with one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from axolotl.prompt_tokenizers import PromptTokenizingStrategy
from axolotl.utils.data import sft, wrappers
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from transformers import PreTrainedTokenizerBase

from axolotl_dskd import __version__
from axolotl_dskd.config import DSKDConfig, about_teacher
from axolotl_dskd.data.paired import PairedStrategy
from axolotl_dskd.data.reconcile import ROW_FORMAT, Reconcile
from axolotl_dskd.data.routing import RoutedStrategy, reconcile_by_teacher, teachers_of
from axolotl_dskd.data.shared_text import writes_dummy_space
from axolotl_dskd.data.token_bytes import normalisations, token_bytes
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, teacher_position_limit

LOG = get_logger(__name__)

_MARK = "_dskd_wrapped"


class _Captured(Exception):
    """Carries a strategy out of Axolotl's dataset wrapper before it tokenizes anything."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy


@contextmanager
def _strategies_handed_over() -> Iterator[None]:
    """While open, Axolotl's function that tokenizes raises `_Captured` with its strategy."""

    def hand_over(strategy: Any, *_: Any, **__: Any) -> None:
        raise _Captured(strategy)

    original = wrappers.wrap_dataset_for_tokenized_prompt
    wrappers.wrap_dataset_for_tokenized_prompt = hand_over
    try:
        yield
    finally:
        wrappers.wrap_dataset_for_tokenized_prompt = original


def _teacher_side(
    config: DSKDConfig, cfg: DictDefault, dataset_config: DictDefault
) -> tuple[DictDefault, DictDefault]:
    """Copies of both configs that let Axolotl build the dataset's strategy for the teacher.

    Axolotl pushes the student's template into every dataset, so both levels are overridden.
    """
    teacher = config.one_teacher
    choice = teacher.chat_template
    if choice is None:
        choice = "jinja" if teacher.chat_template_jinja else "tokenizer_default"
    template = {"chat_template": choice, "chat_template_jinja": teacher.chat_template_jinja}
    teacher_cfg = DictDefault(
        {
            **cfg,
            **template,
            "eot_tokens": teacher.eot_tokens,
            "chat_template_kwargs": None,
            "sequence_len": teacher_position_limit(config),
            "tokenizer_use_mistral_common": None,
        }
    )
    return teacher_cfg, DictDefault({**dataset_config, **template})


def _refuse_unusable(dataset: Any, dataset_config: DictDefault) -> None:
    name = dataset_config.get("path")
    if wrappers._is_dataset_already_tokenized(dataset):
        raise ValueError(
            f"dataset {name} is already tokenized (it has input_ids, attention_mask and labels), "
            "so there is no text to tokenize for the teacher. Give the raw text with its `type:`."
        )


def _pair(get_wrapper: Callable[..., Any], config: DSKDConfig, call: dict[str, Any]) -> Any:
    """Build the dataset's strategy for both sides, and let Axolotl tokenize with the pair."""
    dataset, dataset_config, cfg = call["dataset"], call["dataset_config"], call["cfg"]
    _refuse_unusable(dataset, dataset_config)
    each, route = config.each(), config.route
    names = list(each)
    if route is not None:
        names = teachers_of(dataset, dataset_config, route, list(each))
    student = _strategy(get_wrapper, call)
    pairs = {}
    for name in names:
        with about_teacher(name):
            teacher = _teacher_strategy(get_wrapper, each[name], call)
        pairs[name] = PairedStrategy(student, teacher)
    return wrappers.wrap_dataset_for_tokenized_prompt(
        pairs[""] if route is None else RoutedStrategy(pairs, list(each), route.field),
        dataset,
        process_count=cfg.dataset_num_proc,
        keep_in_memory=cfg.dataset_keep_in_memory is True,
    ), wrappers.UnsupportedPrompter()


def _teacher_strategy(
    get_wrapper: Callable[..., Any], config: DSKDConfig, call: dict[str, Any]
) -> PromptTokenizingStrategy:
    tokenizer = load_teacher_tokenizer(config)
    teacher_cfg, teacher_dataset_config = _teacher_side(config, call["cfg"], call["dataset_config"])
    teacher_call = {
        **call,
        "cfg": teacher_cfg,
        "dataset_config": teacher_dataset_config,
        "tokenizer": tokenizer,
        "processor": None,
    }
    try:
        return _strategy(get_wrapper, teacher_call)
    except ValueError as error:
        if "chat_template" not in str(error):
            raise
        raise ValueError(
            f"the teacher's tokenizer ({config.one_teacher.tokenizer_name}) has no chat template: "
            f"{error}. Name one as dskd.teacher.chat_template (chatml, llama3, jinja, …), the one "
            "that the teacher was trained with."
        ) from error


def _strategy(get_wrapper: Callable[..., Any], call: dict[str, Any]) -> PromptTokenizingStrategy:
    name = call["dataset_config"].get("path")
    kind = call["dataset_config"].get("type")
    try:
        with _strategies_handed_over():
            get_wrapper(**call)
    except _Captured as captured:
        if isinstance(captured.strategy, PromptTokenizingStrategy):
            return captured.strategy
    raise ValueError(
        f"dataset {name} has `type: {kind}`, which does not tokenize prompt and answer row by "
        "row, so it cannot be prepared for a teacher too. Use a supervised type such as alpaca, "
        "chat_template, completion or input_output."
    )


def data_fingerprint(config: DSKDConfig) -> str:
    """What decides the teacher's side of prepared rows, for the key of Axolotl's dataset cache.

    Nothing of what is learned from the rows: all objectives share one prepared data set.
    """
    if config.route is not None:
        each = [(name, data_fingerprint(one)) for name, one in config.each().items()]
        return json.dumps([each, config.route.model_dump()], sort_keys=True)
    tokenizer = load_teacher_tokenizer(config)
    teacher = config.one_teacher
    jinja = teacher.chat_template_jinja or str(tokenizer.chat_template)
    if len(jinja) < 4096 and "{" not in jinja and Path(jinja).is_file():
        jinja = Path(jinja).read_text(encoding="utf-8")
    payload = {
        "version": __version__,
        "tokenizer": tokenizer.name_or_path,
        "tokenizer_content": tokenizer.backend_tokenizer.to_str()
        if getattr(tokenizer, "backend_tokenizer", None)
        else "",
        "template": teacher.chat_template or "",
        "jinja": jinja,
        "eot_tokens": teacher.eot_tokens,
        "limit": teacher_position_limit(config),
        "row_format": ROW_FORMAT,
    }
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()


def make_reconcile(config: DSKDConfig, student: Any, *, truncate_teacher: bool) -> Reconcile:
    """What compares the two sides of this run's rows.

    Args:
        student: its tokenizer.
        truncate_teacher: cut long teacher sides instead of dropping the row.
    """
    teacher = load_teacher_tokenizer(config)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    return Reconcile(
        student_bytes=ours,
        teacher_bytes=theirs,
        student_dummy_spaces=writes_dummy_space(student, ours),
        teacher_dummy_spaces=writes_dummy_space(teacher, theirs),
        teacher_limit=teacher_position_limit(config),
        truncate_teacher=truncate_teacher,
    )


class _Hooks:
    """The three wrappers; remembers the student's tokenizer between two of them."""

    def __init__(self) -> None:
        self.student_tokenizer: PreTrainedTokenizerBase | None = None

    def dataset_wrapper(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def get_dataset_wrapper(*args: Any, **kwargs: Any) -> Any:
            names = ("dataset_config", "tokenizer", "cfg", "dataset_base_type", "dataset")
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            config = DSKDConfig.of(call["cfg"])
            if config is None:
                return original(*args, **kwargs)
            self.student_tokenizer = call["tokenizer"]
            return _pair(original, config, call)

        return get_dataset_wrapper

    def dataset_hash(self, original: Callable[..., str]) -> Callable[..., str]:
        @wraps(original)
        def generate_dataset_hash_from_config(cfg: Any, *args: Any, **kwargs: Any) -> str:
            key = original(cfg, *args, **kwargs)
            config = DSKDConfig.of(cfg)
            if config is None:
                return key
            return hashlib.md5(
                f"{key}|{data_fingerprint(config)}|{cfg.excess_length_strategy or 'drop'}".encode(),
                usedforsecurity=False,
            ).hexdigest()

        return generate_dataset_hash_from_config

    def long_rows(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def handle_long_seq_in_dataset(dataset: Any, sequence_len: int, cfg: Any) -> Any:
            dataset = original(dataset, sequence_len, cfg)
            config = DSKDConfig.of(cfg)
            if config is None:
                return dataset
            assert self.student_tokenizer is not None, "rows come before any dataset"
            strategy = (cfg.excess_length_strategy or "drop").lower()
            each = config.each()
            teachers = [
                (f"teacher {name}".rstrip(), load_teacher_tokenizer(one))
                for name, one in each.items()
            ]
            for side, tokenizer in [("student", self.student_tokenizer), *teachers]:
                if changes := normalisations(tokenizer):
                    LOG.info(f"The {side}'s tokenizer changes text ({', '.join(changes)})")
            reconciles = {
                name: make_reconcile(
                    one, self.student_tokenizer, truncate_teacher=strategy == "truncate"
                )
                for name, one in each.items()
            }
            return reconcile_by_teacher(
                dataset,
                reconciles,
                num_proc=cfg.dataset_num_proc,
                raise_if_long=strategy == "raise",
            )

        return handle_long_seq_in_dataset


def install_hooks() -> None:
    """Wrap Axolotl's three functions; a second call changes nothing."""
    if getattr(sft, _MARK, False):
        return
    hooks = _Hooks()
    sft.get_dataset_wrapper = hooks.dataset_wrapper(sft.get_dataset_wrapper)
    sft.generate_dataset_hash_from_config = hooks.dataset_hash(
        sft.generate_dataset_hash_from_config
    )
    sft.handle_long_seq_in_dataset = hooks.long_rows(sft.handle_long_seq_in_dataset)
    setattr(sft, _MARK, True)
