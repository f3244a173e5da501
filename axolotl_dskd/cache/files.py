"""Files that are there whole or not at all, and what a folder holds. Knows no hidden states."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

TEMPORARY = ".tmp"
#: A temporary file older than this belongs to no writer that still lives.
ABANDONED_SECONDS = 3600.0


class Damaged(Exception):
    """A file that is not what was written.

    Attributes:
        path: which.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path} is damaged: {what}")
        self.path = path


def unique_name(stem: str) -> str:
    """A file name that no other process takes; names sort by the time they were made."""
    return f"{stem}-{time.time_ns():020d}-{secrets.token_hex(4)}"


def write_atomically(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that `path` is, after a kill or a power cut too, absent, old or complete.

    Raises:
        OSError: the disk is full, or the like; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that `read_json` can tell from a damaged one."""
    body = json.dumps(content, sort_keys=True)
    checksum = xxhash.xxh3_128_hexdigest(body.encode())
    text = json.dumps({"checksum": checksum, "content": content}, sort_keys=True, indent=1)
    write_atomically(path, [text.encode(), b"\n"])


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None where there is no such file.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        both = json.loads(path.read_bytes())
        content = both["content"]
        body = json.dumps(content, sort_keys=True).encode()
        if xxhash.xxh3_128_hexdigest(body) != both["checksum"]:
            raise Damaged(path, "its checksum does not match")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(path, str(error)) from error
    return content


def hash_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, as hex.

    Args:
        path: which.
        advance: told the number of bytes after each block.
    """
    digest = hashlib.sha256()
    block = bytearray(1 << 22)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
            advance(count)
    return digest.hexdigest()


@dataclass(frozen=True)
class FolderStatus:
    """What a folder takes.

    Attributes:
        used: bytes in it and below.
        free: bytes left on its disk.
        abandoned: temporary files that no living process writes.
    """

    used: int
    free: int
    abandoned: tuple[Path, ...]


def folder_status(folder: Path) -> FolderStatus:
    """Sizes as they are now; other processes may be writing."""
    used, abandoned = 0, []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.is_file():
                used += status.st_size
                if (
                    path.name.endswith(TEMPORARY)
                    and time.time() - status.st_mtime > ABANDONED_SECONDS
                ):
                    abandoned.append(path)
    at = folder
    while not at.exists():
        at = at.parent
    disk = os.statvfs(at)
    return FolderStatus(used, disk.f_bavail * disk.f_frsize, tuple(abandoned))
