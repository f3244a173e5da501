"""Where a rank starts. Imports nothing heavy: the environment is set before anything reads it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main(
    rank: int, world_size: int, variables: dict[str, str], folder: str, jobs: list[Any]
) -> None:
    """Run the jobs as one rank and write what each returns."""
    os.environ.update(variables)
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
        }
    log = open(Path(folder) / f"rank-{rank}.log", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    import torch

    import tests.support.jobs  # noqa: F401
    from tests.support.jobs.registry import run_job
    from tests.support.process import forget_the_last_training

    # A rank of a fork server would start each worker of a data loader from a server of its own.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        path = Path(folder) / f"{number}-{rank}.pt"
        try:
            if number:
                forget_the_last_training()
            result = run_job(job)
        except BaseException as error:
            traceback.print_exc()
            torch.save({"error": f"{type(error).__name__}: {error}"}, path)
            sys.stderr.flush()
            os._exit(1)
        # Renamed when complete: a killed rank leaves no half of a result.
        torch.save(result, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    os._exit(0)
