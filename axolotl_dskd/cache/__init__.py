"""Final hidden states on disk: how they are packed, named, written, read and checked.

Knows token ids, bytes and files; nothing of models, batches or training.
"""

from axolotl_dskd.cache.codec import Codec
from axolotl_dskd.cache.files import (
    TEMPORARY,
    Damaged,
    FolderStatus,
    folder_status,
    hash_file,
    read_json,
    write_atomically,
    write_json,
)
from axolotl_dskd.cache.keys import dataset_keys, sample_key, supervised_positions
from axolotl_dskd.cache.store import RowReader, RowStore, ShardIndex
from axolotl_dskd.cache.upkeep import Plan, plan_prune, prune, shard_paths, verify_shard

__all__ = [
    "TEMPORARY",
    "Codec",
    "Damaged",
    "FolderStatus",
    "Plan",
    "RowReader",
    "RowStore",
    "ShardIndex",
    "dataset_keys",
    "folder_status",
    "hash_file",
    "plan_prune",
    "prune",
    "read_json",
    "sample_key",
    "shard_paths",
    "supervised_positions",
    "verify_shard",
    "write_atomically",
    "write_json",
]
