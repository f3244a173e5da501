"""Shared fixtures. Axolotl runs happen in this process: starting its CLI takes half a minute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.support.on_cpu  # noqa: F401
from tests.support import process, tiny, vllm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers then end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not vllm.PYTHON.exists():
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(vllm.MISSING))


@pytest.fixture(scope="session", autouse=True)
def _data_sets_handled_in_this_process() -> None:
    process.handle_datasets_in_this_process()


@contextlib.contextmanager
def environment_as_it_was() -> Iterator[None]:
    """Axolotl says by environment variables what accelerate should do, such as FSDP."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    with environment_as_it_was():
        yield


@pytest.fixture
def pair_folder(tmp_path: Path) -> Path:
    """A folder with `student/` and `teacher/` of different tokenizers."""
    tiny.save_pair(tmp_path)
    return tmp_path


@pytest.fixture
def same_vocabulary_folder(tmp_path: Path) -> Path:
    """A folder with `student/` and `teacher/` that share one tokenizer."""
    tiny.save_pair(tmp_path, same_vocabulary=True)
    return tmp_path


@pytest.fixture(scope="session")
def validated() -> Callable[[dict[str, Any]], Any]:
    """Axolotl's own loading and validation of a config."""
    process.prepare_to_train_here()

    def load(config: dict[str, Any]) -> Any:
        from axolotl.cli.config import load_cfg
        from axolotl.utils.dict import DictDefault

        return load_cfg(DictDefault(config))

    return load


@pytest.fixture(scope="session")
def train(validated: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """`axolotl train` without its process start: returns (model, trainer)."""

    def run(config: dict[str, Any]) -> Any:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.common.datasets import load_datasets
        from axolotl.train import train as axolotl_train

        with environment_as_it_was():  # also where a fixture of a module trains
            cfg = validated(config)
            meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
            model, _, trainer = axolotl_train(cfg=cfg, dataset_meta=meta)
        return model, trainer

    return run


@pytest.fixture
def cache_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the teacher's cache warns of (Axolotl's logging lets nothing through to caplog)."""
    from axolotl_dskd.cache import store
    from axolotl_dskd.teacher.cached import identity, open, session

    said: list[str] = []
    for module in (store, identity, open, session):
        monkeypatch.setattr(module.LOG, "warning", said.append)
    return said


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every teacher that is loaded because its cache lacks something."""
    counted: list[int] = []
    from axolotl_dskd.teacher.cached import open as open_module
    from axolotl_dskd.teacher.live import load_live

    def load(*args: Any) -> Any:
        counted.append(1)
        return load_live(*args)

    monkeypatch.setattr(open_module, "load_live", load)
    return counted
