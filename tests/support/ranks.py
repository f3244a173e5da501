"""Several real processes over gloo on one CPU, each running Axolotl as a launcher would start it.

Starting Axolotl takes half a minute, nearly all imports. So a fork server imports it once
(`tests.support.jobs`), and every launch forks its ranks from there in no time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]
Result = dict[str, Any]
#: Exit codes of processes whose memory is damaged.
_NATIVE = {-signal.SIGABRT, -signal.SIGSEGV}


def launch(
    world_size: int, jobs: list[Job], timeout: float = 600, env: dict[str, str] | None = None
) -> list[list[Result]]:
    """Run the jobs one after the other in `world_size` processes.

    Args:
        world_size: number of ranks; 1 is a plain process without a process group.
        jobs: each `{"do": name of a job in tests.support.jobs, **its arguments}`.
        timeout: seconds until the processes are taken to hang and are killed.
        env: environment variables of all ranks.

    Returns:
        `[job][rank]` what the function returned. A raised error is `{"error": its message}`, with
        which that rank ends; a rank that died otherwise has `{"exit": its exit code}`.

    Raises:
        TimeoutError: they hang.
    """
    found, codes = _launched(world_size, jobs, timeout, env)
    if world_size > 1 and _NATIVE & {*codes}:
        # Seen once with FSDP2 over gloo, "malloc(): unaligned tcache chunk", after all steps. No
        # Python of ours or of a test can do that, and a test that fails of it says nothing.
        warnings.warn(f"ranks ended with {codes}, all of them are run again", stacklevel=2)
        found, _ = _launched(world_size, jobs, timeout, env)
    return found


def _launched(
    world_size: int, jobs: list[Job], timeout: float, env: dict[str, str] | None
) -> tuple[list[list[Result]], list[int | None]]:
    """See `launch`; and the exit code of each rank."""
    context, main = _fork_server()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        **(env or {}),
    }
    ranks = [
        context.Process(target=main, args=(rank, world_size, variables, str(folder), jobs))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    if hanging:
        raise TimeoutError(f"ranks {hanging} of {world_size} hang; see the logs in {folder}")

    def result(job: int, rank: int) -> Result:
        path = folder / f"{job}-{rank}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        return {"exit": ranks[rank].exitcode}

    found = [[result(job, rank) for rank in range(world_size)] for job in range(len(jobs))]
    return found, [process.exitcode for process in ranks]


def run(world_size: int, *jobs: Job, **kwargs: Any) -> list[Result]:
    """`launch`, where every rank must succeed: rank 0's result of each job."""
    results = launch(world_size, list(jobs), **kwargs)
    for job, ranks in zip(jobs, results, strict=True):
        for rank, result in enumerate(ranks):
            assert not {"error", "exit"} & result.keys(), f"{job['do']} on rank {rank}: {result}"
    return [ranks[0] for ranks in results]


def kill_during(job: Job, moment: Callable[[], bool], number: int = signal.SIGKILL) -> int:
    """Run a job in one process and send it a signal at a moment, if that comes; its exit code."""
    context, main = _fork_server()
    folder = tempfile.mkdtemp(prefix="killed-")
    process = context.Process(target=main, args=(0, 1, {}, folder, [job]))
    process.start()
    while process.is_alive() and not moment():
        process.join(0.002)
    if process.is_alive():
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
            os.kill(process.pid, number)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _fork_server() -> tuple[Any, Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.jobs"])
    from tests.support.ranks_entry import main

    return context, main


def cpu_count() -> int:
    """Cores of this machine (ranks share them)."""
    return os.cpu_count() or 1
