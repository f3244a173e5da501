"""For each token of the teacher's vocabulary the student's token that its probability goes to.

Made once per pair of tokenizers and kept on disk: the edit distances of two large vocabularies
take minutes of a core. Several processes may make one map at once: each writes a whole file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from axolotl.utils.logging import get_logger

from axolotl_dskd.cache.files import Damaged, read_json, write_json
from axolotl_dskd.data.token_bytes import first_tokens, token_bytes, translation
from axolotl_dskd.objectives.edit_distance import nearest

LOG = get_logger(__name__)

Kind = Literal["edit_distance", "first_token"]
#: To be raised when the same tokenizers would get another map.
_VERSION = 2


@dataclass(frozen=True)
class VocabularyMap:
    """Attributes:
    targets: for each teacher id a student id, -1 for a token without text (other than the end).
    exact: whether that stands for the same bytes.
    """

    targets: list[int]
    exact: list[bool]


def vocabulary_map(
    student: Any, teacher: Any, kind: Kind, turn_ends: tuple[int, int] | None = None
) -> VocabularyMap:
    """The map of two tokenizers, from disk where it is there and whole.

    Equal bytes go to each other, and the end tokens. What is left goes by `kind`:

    - `edit_distance`: to the first token, in the order of ids, at the least edit distance in bytes
      (FuseLLM, arXiv 2401.10491, on strings; the same for two byte-level tokenizers).
    - `first_token`: to the one that the student would have to say next to spell it.

    Args:
        turn_ends: see `Facts`.

    Raises:
        ValueError: one of the tokenizers can't be undone, see `token_bytes`.
    """
    exact = translation(teacher, student, -1, turn_ends and turn_ends[::-1])
    key = _key(student, teacher, f"{kind} {turn_ends}")
    path = cache_folder() / "vocabulary_maps" / f"{kind}-{key}.json"
    targets = _read(path, len(exact))
    if targets is None:
        LOG.info(f"Mapping the teacher's {len(exact)} tokens to the student's ({kind}), once")
        targets = _make(student, teacher, kind, exact)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"targets": targets})
        except OSError as error:
            LOG.warning(f"The vocabulary map cannot be kept for other runs: {error}")
    return VocabularyMap(targets, [index >= 0 for index in exact])


def cache_folder() -> Path:
    """Where things that other runs can use are kept: `$AXOLOTL_DSKD_CACHE`, or below `~/.cache`."""
    return Path(os.environ.get("AXOLOTL_DSKD_CACHE") or Path.home() / ".cache" / "axolotl_dskd")


def _make(student: Any, teacher: Any, kind: Kind, exact: list[int]) -> list[int]:
    spelled = token_bytes(teacher)
    left = [u for u, target in enumerate(exact) if target < 0 and spelled[u]]
    strings = [spelled[u] for u in left]
    if kind == "edit_distance":
        found = nearest(strings, token_bytes(student)).tolist()
    else:
        found = first_tokens(student, strings, untranslatable=-1)
    targets = list(exact)
    for u, target in zip(left, found, strict=True):
        targets[u] = target
    return targets


def _key(student: Any, teacher: Any, kind: str) -> str:
    """Names everything that the map depends on: the tokenizers' content, not their names."""
    digest = hashlib.blake2b(f"{_VERSION} {kind}".encode(), digest_size=16)
    for tokenizer in (student, teacher):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        for passing in ("truncation", "padding"):  # of the last call
            content.pop(passing, None)
        special = [tokenizer.eos_token_id, sorted(tokenizer.all_special_ids)]
        digest.update(json.dumps([content, special]).encode())
    return digest.hexdigest()


def _read(path: Path, length: int) -> list[int] | None:
    try:
        content = read_json(path)
    except (Damaged, OSError) as error:
        LOG.warning(f"The vocabulary map is made anew: {error}")
        return None
    targets = None if content is None else content.get("targets")
    return targets if isinstance(targets, list) and len(targets) == length else None
