"""What cannot be loaded, in words. Knows nothing of what is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(what: str, advice: str = "") -> Iterator[None]:
    """Say of something that it cannot be loaded, why, and what to do.

    Args:
        what: the teacher 'org/model', and the like.
        advice: a sentence or two.

    Raises:
        ValueError: in place of the errors with which libraries say so.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{what} cannot be loaded: {error}\n{advice}".rstrip()) from error
