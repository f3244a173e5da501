"""Requests to servers that share a load: in flight at once, made again where a server fails.

Knows addresses, waiting and HTTP; not what is asked. Requests run in one thread beside training.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import random
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from axolotl.utils.logging import get_logger

from axolotl_dskd.config import Endpoint

LOG = get_logger(__name__)

T = TypeVar("T")

#: Answers that say "later", not "no".
_LATER = {408, 425, 429, 500, 502, 503, 504}
#: Seconds between tries double up to this; a server may ask for more, up to `_LONGEST_ASKED`.
_LONGEST_WAIT, _LONGEST_ASKED = 30.0, 600.0
_SHOWN = 300


class Failure(Exception):
    """A server's failure that may pass."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Refused(ValueError):
    """A server says that it will never do what it was asked for."""


@dataclass(frozen=True)
class Answer:
    """What a server said with status 200.

    Attributes:
        url: which server.
        headers: by name in lower case.
        content: the body.
    """

    url: str
    headers: dict[str, str]
    content: bytes


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    rests_until: float = field(default=0.0)  # of time.monotonic


class Servers:
    """Servers of one model.

    Args:
        config: where they are and how patient to be.
        hint: how they have to be started, in words.
        advice: added where they stay away, such as which checkpoint to resume from.

    Raises:
        ValueError: the key is not in the environment.
    """

    def __init__(self, config: Endpoint, hint: str, advice: Callable[[], str] = lambda: "") -> None:
        self.config = config
        self.hint = hint
        self.advice = advice
        self._servers = [_Server(url) for url in config.addresses]
        key = config.api_key
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        for url in config.addresses:
            address = urlsplit(url)
            here = address.hostname in ("127.0.0.1", "::1", "localhost")
            if key is not None and address.scheme == "http" and not here:
                LOG.warning(f"The key goes to {url} in plain text; https would hide it.")
        self._loop = asyncio.new_event_loop()
        self._client: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(config.concurrency)
        # A daemon: a run that ends in an error waits for no server.
        threading.Thread(target=self._loop.run_forever, name="servers", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin something that asks, at most `concurrency` at a time."""

        async def in_a_slot() -> T:
            async with self._slots:
                return await work

        return asyncio.run_coroutine_threadsafe(in_a_slot(), self._loop)

    async def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        limit: int = 1 << 20,
        url: str | None = None,
        final: Collection[int] = (),
    ) -> Answer:
        """One answer, from whichever server is least busy; asked for again where one fails.

        Args:
            method, path, body: the request; a body goes as JSON.
            limit: bytes that an answer may have.
            url: ask this server and no other.
            final: statuses that mean "no" here, though otherwise "later".

        Raises:
            ValueError: no server answers, or (`Refused`) one refuses the request.
        """
        tried = 0
        began = time.monotonic()
        while True:
            server = await self._free(url)
            server.in_flight += 1
            try:
                return await self._once(server.url, method, path, body, limit, final)
            except Failure as failure:
                tried += 1
                if tried > self.config.retries:
                    raise ValueError(self._given_up(server, failure, began)) from None
                wait = failure.wait
                if wait is None:
                    wait = min(2.0 ** (tried - 1), _LONGEST_WAIT) * random.uniform(0.75, 1.25)
                now = time.monotonic()
                if server.rests_until < now:  # said once, not by every request in flight
                    LOG.warning(f"{server.url}: {failure}. Asked again in {wait:.0f} s.")
                server.rests_until = max(server.rests_until, now + wait)
            finally:
                server.in_flight -= 1

    def close(self) -> None:
        """Give up what is in flight. Another request opens the connections again."""

        async def cancel() -> None:
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            if self._client is not None:
                await self._client.aclose()
                self._client = None

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(cancel(), self._loop).result(timeout=10)

    async def _free(self, url: str | None) -> _Server:
        """A server that does not rest; waits for the first where all do."""
        while True:
            now = time.monotonic()
            servers = [server for server in self._servers if url in (None, server.url)]
            best = min(servers, key=lambda s: (max(s.rests_until, now), s.in_flight))
            if best.rests_until <= now:
                return best
            await asyncio.sleep(best.rests_until - now)

    async def _once(
        self,
        url: str,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        limit: int,
        final: Collection[int],
    ) -> Answer:
        if self._client is None:
            self._client = httpx.AsyncClient(
                headers=self._headers,
                timeout=httpx.Timeout(self.config.timeout, connect=min(10, self.config.timeout)),
                limits=httpx.Limits(max_connections=self.config.concurrency),
            )
        try:
            async with (
                asyncio.timeout(self.config.timeout),  # also of an answer that drips
                self._client.stream(method, url + path, json=body) as response,
            ):
                content = b""
                parts = []
                size = 0
                async for part in response.aiter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        raise ValueError(
                            f"{url}{path} answers with more than the {limit:,} bytes that were "
                            f"asked for ({response.headers.get('content-type')}). Is it such a "
                            f"vLLM? {self.hint}"
                        )
                content = b"".join(parts)
        except TimeoutError:
            raise Failure(f"no answer within {self.config.timeout:g} s") from None
        except httpx.LocalProtocolError:  # its words hold the headers, and so the key
            raise ValueError(f"{url}{path}: the request cannot be sent as it is") from None
        except httpx.RequestError as error:
            raise Failure(str(error) or type(error).__name__) from None
        if response.status_code == 200:
            return Answer(url, dict(response.headers), content)
        said = f"{response.status_code} {response.reason_phrase}: {_shown(content)}"
        if response.status_code in _LATER and response.status_code not in final:
            raise Failure(said, _asked_wait(response.headers.get("retry-after")))
        raise Refused(f"{url}{path} refuses the request: {said}{self._remedy(response)}")

    def _remedy(self, response: httpx.Response) -> str:
        if response.status_code in (401, 403):
            named = self.config.api_key_env
            return (
                f"\nThe key in {named} is not the server's."
                if named
                else "\nIt wants a key: name the environment variable that holds it in "
                "the server's api_key_env."
            )
        if response.status_code in (404, 405):
            return f"\n{self.hint}"
        return ""

    def _given_up(self, server: _Server, failure: Failure, began: float) -> str:
        return "\n".join(
            filter(
                None,
                (
                    f"the server {server.url} gave no answer in "
                    f"{self.config.retries + 1} tries over {time.monotonic() - began:.0f} s; the "
                    f"last one: {failure}.",
                    f"Start it again. {self.hint}",
                    self.advice(),
                ),
            )
        )


def _asked_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = then.timestamp() - time.time()
    return min(max(seconds, 0.0), _LONGEST_ASKED) if seconds == seconds else None


def _shown(content: bytes) -> str:
    """The beginning of an answer in words, without what a terminal would take for commands."""
    text = content[:_SHOWN].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip() or "(nothing)"
