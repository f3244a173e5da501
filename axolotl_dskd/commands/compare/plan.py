"""From one YAML to the configurations of all runs: what differs is under `dskd:`, and the seed.

Knows files and configurations; loads no model and no Axolotl, so that what is wrong is said at
once.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from axolotl_dskd.config import CompareConfig, DSKDConfig, ObjectiveConfig, TeacherConfig

Config = dict[str, Any]

#: Raised when what is kept of a run changes.
_FORMAT = 1
#: Packages whose version may change a result.
_PACKAGES = ("axolotl-dskd", "axolotl", "torch", "transformers")
#: Larger files are known by their size and time.
_HASHED_BYTES = 64 << 20
_SECRET = re.compile(r"(api_key|password|secret|(hf|hub|auth)_token)$")
#: Keys that would take a run's start or its result out of its folder.
_ELSEWHERE = (
    "hub_model_id",
    "hub_strategy",
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
)
_SAVING = ("save_strategy", "save_steps", "saves_per_epoch")
_PICKS_A_CHECKPOINT = ("metric_for_best_model", "early_stopping_patience", "load_best_model_at_end")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        method: the run's name in the comparison.
        seed: of everything that is drawn.
        config: Axolotl's, complete.
        folder: where its configuration, log, result and model go.
        digest: of all that decides its result.
    """

    method: str
    seed: int
    config: Config
    folder: Path
    digest: str

    @property
    def name(self) -> str:
        """Of the run among all."""
        return f"{self.method}-seed{self.seed}"

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher takes part."""
        return DSKDConfig.model_validate(self.config["dskd"]).uses_teacher


def plan_runs(base: Config, compare: CompareConfig, out: Path, gpus: int = 1) -> list[Run]:
    """All runs, seed by seed.

    Args:
        base: the YAML, without its `compare:`.
        compare: what to compare.
        out: folder of the comparison.
        gpus: of each run, which change what a batch is.

    Raises:
        ValueError: an unknown method, a run whose `dskd:` block is refused, two runs that are the
            same, nothing held out.
    """
    if not compare.runs:
        raise ValueError(
            "nothing to compare. Name the runs, such as --runs sft,dual_space, or write\n"
            "compare:\n  runs: {sft: {}, dual_space: {}}"
        )
    if not base.get("datasets"):
        raise ValueError("there are no `datasets:`, whose rows the runs would train on.")
    base = _held_out(copy.deepcopy(base), compare.held_out)
    if strange := [name for name in compare.runs if re.search(r"^$|^\.|[/\\\0]", name)]:
        raise ValueError(
            f"{strange[0]!r} is no name for a run, whose folder has it. Write another."
        )
    blocks = {name: _block(base, name, changes) for name, changes in compare.runs.items()}
    typed = [DSKDConfig.model_validate(block) for block in blocks.values()]
    for k, name in enumerate(blocks):
        if typed[k] in typed[:k]:
            same = list(blocks)[typed.index(typed[k])]
            raise ValueError(f"the runs {same} and {name} are one: they change the same keys.")
    files = _input_files(base, typed)
    # Axolotl takes prepared rows for those of a file of the same name, whatever it holds today.
    prepared = out / "prepared" / _digest(files)[:12]
    runs = []
    for seed in dict.fromkeys(compare.seeds or [base.get("seed") or 42]):
        for name, block in blocks.items():
            config = _run_config(base, block, seed)
            digest = _digest([_FORMAT, config, files, versions(), gpus])
            folder = out / f"{name}-seed{seed}"
            config |= {
                "output_dir": str(folder / "model"),
                "dataset_prepared_path": str(prepared / f"seed{seed}"),
            }
            ours = config["dskd"]
            for teacher in (ours.get("teachers") or {"": ours["teacher"]}).values():
                if _gives_whole_states(TeacherConfig.model_validate(teacher)):
                    teacher.setdefault("cache", _cache(teacher, out))
            runs.append(Run(name, seed, config, folder, digest))
    return runs


def shown(config: Any) -> Any:
    """A configuration as it may be handed on: without the values of keys that hold secrets."""
    if isinstance(config, list):
        return [shown(value) for value in config]
    if not isinstance(config, dict):
        return config
    return {
        key: "(not shown)" if _SECRET.search(str(key)) and value else shown(value)
        for key, value in config.items()
    }


def merged(base: Config, changes: Config) -> Config:
    """`base` with the keys of `changes`, block by block."""
    both = dict(base)
    for key, value in changes.items():
        inner = both.get(key)
        both[key] = (
            merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
        )
    return both


def _block(base: Config, name: str, changes: Config) -> Config:
    """A run's `dskd:` block."""
    block, changes = copy.deepcopy(base["dskd"]), copy.deepcopy(changes)
    for keys in (block, changes):
        if isinstance(keys.get("objective"), str):
            keys["objective"] = {"name": keys["objective"]}
        elif not isinstance(keys.get("objective", {}), dict):
            raise ValueError(
                f"the run {name} is refused: its objective is {keys['objective']!r}. Write a name, "
                "or a block with a `name:`."
            )
    configured = block.get("objective", {}).get("name", "dual_space")
    if name == "sft":
        changes.setdefault("kd_ratio", 0)
        for key in ("samples", "virtual_attention"):  # the data's rows, plainly
            block.pop(key, None)
    elif name in ObjectiveConfig.known:
        changes["objective"] = {"name": name} | changes.get("objective", {})
    elif not changes and name != "dskd":
        known = sorted({"sft", "dskd", *ObjectiveConfig.known})
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"there is no method {name!r}.{f' Did you mean {close[0]}?' if close else ''} Known: "
            f"{', '.join(known)}; a run of another name must say what it changes under `dskd:`."
        )
    if changes.get("objective", {}).get("name", configured) != configured:
        block.pop("objective", None)  # its keys are another objective's
    block = merged(block, changes)
    try:
        typed = DSKDConfig.model_validate(block)
    except ValueError as error:
        raise ValueError(f"the run {name} is refused: {error}") from error
    block["evaluation"] = merged(block.get("evaluation", {}), {"record": True})
    teachers = [one.one_teacher for one in typed.each().values()]
    if all(map(_gives_whole_states, teachers)):
        # From its cache, so that it costs runs without a teacher little.
        block["evaluation"].setdefault("teacher", True)
    return block


def _gives_whole_states(teacher: TeacherConfig) -> bool:
    """Whether it can fill a cache: with a part of each layer, or log-probabilities, it cannot."""
    return teacher.gives == "states" and teacher.shard != "full"


def _run_config(base: Config, block: Config, seed: int) -> Config:
    config = {key: value for key, value in copy.deepcopy(base).items() if key not in _ELSEWHERE}
    config |= {"dskd": copy.deepcopy(block), "seed": seed}
    never = ("no", "false", "none")  # YAML reads no as False
    if str(config.get("eval_strategy")).lower() in never:
        config.pop("eval_strategy", None)
    if not any(config.get(key) for key in ("eval_strategy", "eval_steps", "evals_per_epoch")):
        config["eval_strategy"] = "epoch"
    if not any(config.get(key) for key in _PICKS_A_CHECKPOINT):
        config = {key: value for key, value in config.items() if key not in _SAVING}
        config["save_strategy"] = "no"  # the final model alone
    return config


def _held_out(base: Config, held_out: str | float | None) -> Config:
    """The configuration with rows to evaluate on."""
    if isinstance(held_out, str):
        path = Path(held_out).expanduser()
        if not path.is_file():
            raise ValueError(f"the held-out file {held_out} does not exist. Write its path.")
        first = base["datasets"][0]
        like = {k: v for k, v in first.items() if k not in ("path", "data_files", "shards")}
        rows = like | {"path": str(path), "ds_type": "json", "split": "train"}
        return base | {"test_datasets": [rows], "val_set_size": 0}
    if held_out is not None:
        whole = int(held_out) if held_out >= 1 else held_out
        return {k: v for k, v in base.items() if k != "test_datasets"} | {"val_set_size": whole}
    if not base.get("test_datasets") and not base.get("val_set_size"):
        raise ValueError(
            "no rows are held out, so there is nothing to compare on. Name a file with --held-out "
            "rows.jsonl, or a share of the data with --held-out 0.1; or set val_set_size."
        )
    return base


def _cache(teacher: Config, out: Path) -> Config:
    """One teacher cache for all runs, in the dtype that the teacher runs in or a wider one."""
    dtype = "float32" if teacher.get("dtype") == "float32" else "auto"
    return {"path": str(out / "teacher-cache"), "dtype": dtype}


def versions() -> dict[str, str]:
    """What runs are made with."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def _digest(content: Any) -> str:
    plain = json.loads(json.dumps(content, default=str))  # keys of one kind, which sort
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _input_files(base: Config, blocks: Iterable[DSKDConfig]) -> list[list[Any]]:
    """Local files that the runs read, each with what tells it from another version of it."""
    names = [base.get("base_model"), base.get("tokenizer_config")]
    for teacher in (one.one_teacher for block in blocks for one in block.each().values()):
        names += [teacher.base_model, teacher.adapter, teacher.tokenizer]
    for dataset in [*(base.get("datasets") or []), *(base.get("test_datasets") or [])]:
        inside = dataset.get("data_files") or []
        names += [dataset.get("path"), *([inside] if isinstance(inside, str) else inside)]
    names += [sys.modules[type(block.objective).__module__].__file__ for block in blocks]
    found = []
    for path in sorted({Path(str(name)).expanduser() for name in names if name}):
        inside = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
        for file in inside:
            if file.is_file():
                found.append([str(file), _identity(file)])
    return found


def _identity(file: Path) -> list[Any]:
    status = file.stat()
    if status.st_size > _HASHED_BYTES:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, xxhash.xxh3_128_hexdigest(file.read_bytes())]
