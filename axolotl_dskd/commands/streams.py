"""Where what libraries print and log goes while a command answers."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def logs_on_stderr() -> Iterator[TextIO]:
    """While open, what libraries print and log goes to stderr. Yields stdout, for the answer.

    Entered before they are imported, since they keep the stream that they find.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        import axolotl.cli  # noqa: F401

        known = (logging.getLogger(name) for name in logging.root.manager.loggerDict)
        handlers = [h for logger in (logging.root, *known) for h in logger.handlers]
        moved = [
            handler
            for handler in handlers
            if isinstance(handler, logging.StreamHandler)
            and handler.stream in (out, sys.__stdout__)
        ]
        for handler in moved:
            handler.setStream(sys.stderr)
        try:
            yield out
        finally:
            for handler in moved:
                handler.setStream(out)


@contextmanager
def quiet() -> Iterator[None]:
    """While open, libraries log errors only, and datasets draws no bars: the report is the output.

    Entered before they are imported, since some of them log while they are.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets

            bars = datasets.are_progress_bars_disabled()
            datasets.disable_progress_bars()
            yield
    finally:
        logging.disable(before)
        if not bars:
            datasets.enable_progress_bars()
