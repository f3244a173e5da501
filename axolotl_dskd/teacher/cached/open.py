"""Opening a teacher's cache: which folder is its own, and the head and embedding in there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from axolotl.utils.logging import get_logger

from axolotl_dskd.cache import Codec, Damaged, RowStore, read_json, write_json
from axolotl_dskd.config import CacheConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.teacher.cached.identity import TeacherIdentity, teacher_identity
from axolotl_dskd.teacher.cached.states import Body, CachedStates
from axolotl_dskd.teacher.cached.tables import EmbeddingTable, Tables, read_tables, write_tables
from axolotl_dskd.teacher.live import load_live
from axolotl_dskd.teacher.reading import ReadingTeacher, check_sizes
from axolotl_dskd.teacher.served.teacher import open_served
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun

LOG = get_logger(__name__)

IDENTITY, TABLES = "teacher.json", "head.safetensors"


def cache_settings(spec: TeacherSpec) -> CacheConfig:
    """The `cache:` block of a teacher.

    Raises:
        ValueError: there is none.
    """
    if spec.config.cache is None:
        raise ValueError(
            "there is no `cache:` in dskd.teacher. Add\n"
            "dskd:\n  teacher:\n    cache:\n      path: ./outputs/teacher-cache"
        )
    return spec.config.cache


@dataclass(frozen=True)
class CacheFolder:
    """Where the states of one configured teacher are.

    Attributes:
        root: the configured folder, which other teachers may share.
        storage: dtype of the stored states.
        max_bytes: what `root` may grow to, or None.
        identity: whose states they are.
    """

    root: Path
    storage: str
    max_bytes: int | None
    identity: TeacherIdentity

    @classmethod
    def of(cls, spec: TeacherSpec) -> CacheFolder:
        """The folder of a teacher. Nothing is written, but for hashes of its weights.

        Raises:
            ValueError: there is no such teacher, or nothing of it is to be cached.
        """
        settings = cache_settings(spec)
        root = Path(settings.path)
        identity = teacher_identity(spec.config, spec.dtype, root)
        return cls(root, settings.storage, settings.max_size, identity)

    @property
    def path(self) -> Path:
        """This teacher's own folder."""
        return self.root / f"{self.identity.digest}-{self.storage}"


def open_cache(spec: TeacherSpec, run: TrainingRun | None = None) -> CachedStates:
    """The cache of a teacher. Loads the teacher only if head and embedding are not cached yet.

    Args:
        spec: the teacher.
        run: who asks; None: a command beside training.

    Raises:
        ValueError: there is no such teacher, or it cannot be used as one.
    """
    folder = CacheFolder.of(spec)
    loaded: ReadingTeacher | None = None
    tables = _known_tables(folder.path, spec)
    if tables is None:
        _say_what_differs(folder)
        loaded = _load(spec, run)
        tables = _keep_tables(folder.path, loaded, spec)
    if not (folder.path / IDENTITY).exists():
        _keep_identity(folder)
    check_sizes(tables.head, tables.embedding.weight, spec.vocab_size)
    codec = Codec(folder.storage, tables.head.hidden_size)
    store = RowStore(
        folder.path, codec.bytes_per_token, root=folder.root, max_bytes=folder.max_bytes
    )
    body = Body(lambda: _load(spec, run), loaded)
    return CachedStates(store, codec, tables.head, tables.embedding, body)


def _load(spec: TeacherSpec, run: TrainingRun | None) -> ReadingTeacher:
    return load_live(spec) if spec.config.server is None else open_served(spec, run)


def _known_tables(folder: Path, spec: TeacherSpec) -> Tables | None:
    try:
        return read_tables(folder / TABLES, spec.vocab_size, spec.device)
    except Damaged as error:
        LOG.warning(f"Teacher cache: {error}. It is written again from the teacher.")
        return None


def _keep_tables(folder: Path, teacher: ReadingTeacher, spec: TeacherSpec) -> Tables:
    table = EmbeddingTable.of(teacher.model.get_input_embeddings())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(folder / TABLES, output_head(teacher.model), table)
    except OSError as error:
        LOG.warning(f"Teacher cache: {folder} cannot be written: {error}. The work goes on.")
    return Tables(teacher.head, EmbeddingTable(table.weight.to(spec.device), table.scale))


def _keep_identity(folder: CacheFolder) -> None:
    identity = folder.identity
    content = {"base_model": identity.base_model, "content": identity.content}
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / IDENTITY, content)
    except OSError as error:
        LOG.warning(f"Teacher cache: {folder.path} cannot be written: {error}. The work goes on.")


def _say_what_differs(folder: CacheFolder) -> None:
    """Say it where the root holds the states of what looks like the same teacher."""
    identity = folder.identity
    for path in sorted(folder.root.glob(f"*/{IDENTITY}")):
        try:
            known = read_json(path) or {}
        except Damaged:
            continue
        if known.get("base_model") != identity.base_model:
            continue
        theirs = known["content"]
        names = sorted(
            name
            for name in theirs.keys() | identity.content.keys()
            if theirs.get(name) != identity.content.get(name)
        )
        if names:
            LOG.warning(
                f"Teacher cache: {path.parent} is of {identity.base_model} too, but cannot be "
                f"used: it differs in {', '.join(names)}."
            )
