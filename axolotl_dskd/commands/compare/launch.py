"""Runs as processes: some side by side, each with a log; what is finished is not done again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from axolotl_dskd.commands.compare.outcome import RESULT, Outcome, finish, finished
from axolotl_dskd.commands.compare.plan import Run
from axolotl_dskd.commands.compare.reporter import Reporter
from axolotl_dskd.evaluation.record import RECORD

LOG = "log.txt"
_TAIL = 25
_PAUSE = 0.5


@dataclass(frozen=True)
class Failure:
    """A run that ended badly: its name, where its log is, and what it said last."""

    name: str
    log: Path
    tail: str


@dataclass
class _Running:
    run: Run
    process: subprocess.Popen[bytes]
    place: str
    began: float
    where: tuple[float, str] = (0.0, "starting")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While open, SIGTERM ends this process as Ctrl-C does, by an exception: what it has started
    would go on without it."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@_terminated_as_interrupted()
def run_all(
    runs: Sequence[Run], places: Sequence[str], reporter: Reporter, lock: int
) -> tuple[list[Outcome], list[Failure]]:
    """Train what is not finished yet, in order; one that fails does not stop the others.

    Args:
        places: values of CUDA_VISIBLE_DEVICES, one per run that may run at a time; "" keeps it.
        lock: a file that the processes hold open, see `only_one`.
    """
    outcomes: dict[str, Outcome] = {}
    failures: list[Failure] = []
    waiting: list[Run] = []
    for run in runs:
        if (outcome := finished(run)) is not None:
            outcomes[run.name] = outcome
            reporter.finished(run.name, "finished before")
            continue
        waiting.append(run)
        if (run.folder / RESULT).is_file():
            reporter.say(
                f"{run.name} is trained again: its configuration, data or versions are not those "
                "of its result, which is kept under another name."
            )
    running: list[_Running] = []
    free = list(places)
    try:
        while waiting or running:
            while free and waiting:
                running.append(_start(waiting.pop(0), free.pop(0), lock))
            time.sleep(_PAUSE)
            for one in list(running):
                one.where = _progress(one.run) or one.where
                reporter.update(one.run.name, *one.where)
                ended, status, usage = os.wait4(one.process.pid, os.WNOHANG)
                if not ended:
                    continue
                one.process.returncode = os.waitstatus_to_exitcode(status)
                running.remove(one)
                free.append(one.place)
                found = _end(one, usage.ru_maxrss * 1024)
                if isinstance(found, Outcome):
                    outcomes[one.run.name] = found
                    reporter.finished(one.run.name, f"{found.last.bits_per_byte:.4f} bits per byte")
                else:
                    failures.append(found)
                    reporter.failed(one.run.name, found.tail, found.log)
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
    return [outcomes[run.name] for run in runs if run.name in outcomes], failures


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Let one comparison at a time work in a folder.

    Yields a descriptor for its processes: as long as one of them lives, also after its parent was
    killed, no other comparison begins here.

    Raises:
        ValueError: another one works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"a comparison in {folder} is still at work, or a training that it started. Wait "
                "for it, end it, or choose another folder with --out."
            ) from None
        yield file.fileno()


def train_command(config: Path, *, several: bool) -> list[str]:
    """`axolotl train`; several: processes, one for each of the GPUs that it sees. These meet at a
    free port, or launchers that start side by side would take the same one."""
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(config)]
    more = ["--", "--main_process_port", "0"] if several else ["--launcher", "python"]
    return [*command, *more]


def _start(run: Run, place: str, lock: int) -> _Running:
    _clear(run.folder)
    run.folder.mkdir(parents=True)
    path = run.folder / "config.yaml"
    path.write_text(yaml.safe_dump(run.config, sort_keys=False), encoding="utf-8")
    # DeepSpeed opens a process group in a run alone, too.
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "MASTER_PORT": str(_free_port())}
    if place:
        environment["CUDA_VISIBLE_DEVICES"] = place
    with (run.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            train_command(path, several="," in place),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
        )
    return _Running(run, process, place, time.monotonic())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _clear(folder: Path) -> None:
    """Remove what a killed run has left; one that had ended well is kept under another name."""
    if (folder / RESULT).is_file():
        when = time.strftime("%Y%m%d-%H%M%S", time.localtime((folder / RESULT).stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-of-{when}"))
    shutil.rmtree(folder, ignore_errors=True)


def _end(one: _Running, host_bytes: int) -> Outcome | Failure:
    log = one.run.folder / LOG
    problem = ""
    if one.process.returncode == 0:
        try:
            return finish(one.run, seconds=time.monotonic() - one.began, host_bytes=host_bytes)
        except ValueError as error:
            problem = f"\n{error}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    return Failure(one.run.name, log, "\n".join(lines) + problem)


def _progress(run: Run) -> tuple[float, str] | None:
    """Share done and where the run is, from the end of its record; None where no step is said
    there (what an evaluation has found is long)."""
    path = Path(run.config["output_dir"]) / RECORD
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(0, size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            said = json.loads(line)
        except ValueError:  # the beginning of a long line, or one that is being written
            continue
        if "log" in said and said.get("max_steps"):
            return said["step"] / said["max_steps"], f"step {said['step']} of {said['max_steps']}"
    return None
