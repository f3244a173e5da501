"""The jobs that `tests.support.ranks` can ask a rank for, by name. Knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

JOBS: dict[str, Callable[..., Any]] = {}


def job(function: Function) -> Function:
    """Register a function as a job under its name; a name twice is a mistake."""
    assert function.__name__ not in JOBS, f"two jobs are called {function.__name__}"
    JOBS[function.__name__] = function
    return function


def run_job(request: dict[str, Any]) -> Any:
    """Run `{"do": name, **arguments}` in this process and return what the job returns."""
    arguments = dict(request)
    name = arguments.pop("do")
    if name not in JOBS:
        raise ValueError(f"there is no job {name!r}; jobs are {sorted(JOBS)}")
    return JOBS[name](**arguments)
