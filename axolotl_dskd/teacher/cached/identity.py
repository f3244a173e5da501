"""What decides a teacher's hidden states, as one short name.

The weights' and the config's content, the adapter's, the quantisation and the dtype. Not where the
files lie, when they were downloaded or what the commit is called: a README edited on the hub does
not make a cache worthless. Nor the device or the attention kernel, which only round differently.
Tokenizer and template act through the token ids, which every sample is filed under.

Of a served teacher the layers need not be here: it is known by the files that hold its ends and by
its name there, where that is another one, and kept apart from one that is loaded, since the
server's dtype and quantisation are its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from axolotl_dskd.cache import Damaged, hash_file, read_json, write_json
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.progress import Progress
from axolotl_dskd.teacher.served.ends import end_files

LOG = get_logger(__name__)

#: Config keys that say how a file was written, not what the model computes.
_NOT_CONTENT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
_MEMO = "weights.json"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class TeacherIdentity:
    """A teacher as its hidden states see it.

    Attributes:
        content: what decides the states, by name.
        base_model: how the configuration calls it.
    """

    content: dict[str, str]
    base_model: str

    @property
    def digest(self) -> str:
        """16 hex digits."""
        text = json.dumps(self.content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def teacher_identity(config: TeacherConfig, dtype: torch.dtype, root: Path) -> TeacherIdentity:
    """The identity of a configured teacher, without loading it.

    Reads every byte of local weights once; `root` remembers the result for files that have not
    changed since. Files of the hub's cache are named by their hash already.

    Raises:
        ValueError: there are no weights or no config.
    """
    memo = _Memo(root / _MEMO)
    name, revision = config.base_model, config.revision
    parts = {
        "weights": _weights_hash(name, revision, memo)
        if config.server is None
        else memo.hash_all(end_files(config)),
        "config": _config_hash(name, revision),
        "quantisation": "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else "",
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.adapter:
        files = [_file(config.adapter, None, "adapter_config.json")]
        files.append(
            _file(config.adapter, None, "adapter_model.safetensors")
            or _file(config.adapter, None, "adapter_model.bin")
        )
        if None in files:
            raise ValueError(
                f"dskd.teacher.adapter: {config.adapter!r} has no adapter_config.json with "
                "adapter_model.safetensors."
            )
        parts["adapter"] = memo.hash_all([path for path in files if path])
    if config.server is not None:
        # Files here cannot tell a fine-tune or an adapter of theirs that the server has.
        name_there = config.server.model
        parts["served"] = "yes" if name_there in (None, name) else f"as {name_there}"
    if config.trust_remote_code:
        config_file = _file(name, revision, "config.json")
        assert config_file is not None
        parts["code"] = memo.hash_all(sorted(config_file.parent.glob("*.py")))
    return TeacherIdentity(parts, name)


def _file(name: str, revision: str | None, filename: str) -> Path | None:
    try:
        found = cached_file(
            name,
            filename,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the teacher's {filename} cannot be found in {name!r}: {error}") from None
    return Path(found) if found else None


def _config_hash(name: str, revision: str | None) -> str:
    path = _file(name, revision, "config.json")
    if path is None:
        raise ValueError(f"the teacher {name!r} has no config.json. Check dskd.teacher.base_model.")
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in _NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _weights_hash(name: str, revision: str | None, memo: _Memo) -> str:
    config_file = _file(name, revision, "config.json")
    # A commit of the hub never changes: known once, its weights need not even be here again.
    commit = config_file.parent.name if config_file is not None else ""
    known = (
        f"{name}@{commit}" if config_file and config_file.parent.parent.name == "snapshots" else ""
    )
    if known and (found := memo.content.get(known)):
        return found
    files: list[Path] = []
    for single, index in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME),
    ):
        if path := _file(name, revision, single):
            files = [path]
        elif path := _file(name, revision, index):
            shards, _ = get_checkpoint_shard_files(name, str(path), revision=revision)
            files = [Path(shard) for shard in shards]
        if files:
            break
    if not files:
        raise ValueError(
            f"the teacher {name!r} has neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}, so its "
            "cache cannot be told from another's. Check dskd.teacher.base_model (an adapter goes "
            "to dskd.teacher.adapter)."
        )
    digest = memo.hash_all(files)
    if known:
        memo.remember({known: digest})
    return digest


class _Memo:
    """Hashes of files, remembered by path, size and time of change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content: dict[str, Any] = read_json(path) or {}
        except Damaged as error:
            LOG.warning(f"Teacher cache: {error}. The weights are hashed again.")
            self.content = {}

    def remember(self, entries: dict[str, str]) -> None:
        self.content |= entries
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.content)
        except OSError as error:
            LOG.warning(f"Teacher cache: {self.path} cannot be written: {error}")

    def hash_all(self, files: list[Path]) -> str:
        """One hash over the names and contents of files."""
        known, todo = {}, {}
        for path in files:
            target = path.resolve()
            status = target.stat()
            note = f"{target}|{status.st_size}|{status.st_mtime_ns}"
            if _SHA256.fullmatch(target.name) and target.parent.name == "blobs":
                known[path.name] = target.name
            elif note in self.content:
                known[path.name] = self.content[note]
            else:
                todo[note] = path
        if todo:
            total = sum(path.stat().st_size for path in todo.values())
            entries = {}
            with Progress("Teacher's weights: hashing", total, "bytes") as progress:
                for note, path in todo.items():
                    known[path.name] = entries[note] = hash_file(path.resolve(), progress.advance)
            self.remember(entries)
        text = json.dumps(known, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
