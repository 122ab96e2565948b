"""Who does the work of a scan: this machine's threads, each with a decoding child, or a Dask cluster.

Both are a `concurrent.futures.Executor`. Threads, because the work is done in the children (see `readers.child`): a
thread only waits for one. Nothing is forked, so that no handle of GDAL crosses into another process. A cluster's
workers and this process trust one another: Dask moves pickles between them. What a file says reaches them only through
a child.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from geomed_mae.errors import ConfigError, MissingExtraError
from geomed_mae.readers.child import close_children

AHEAD = 4
"""Tasks that wait for each worker: enough that none is idle, and a million files need no million futures."""

CONNECT_SECONDS = 30


@dataclass(frozen=True)
class Workers:
    """An executor and how many tasks it does at once; without one, the calling thread works."""

    executor: Executor | None
    count: int

    def results(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (position, function(item)) of each item as it is done, in no order.

        Raises:
            whatever `function` raises; what has not begun is then cancelled.
        """
        if self.executor is None:
            yield from ((position, function(item)) for position, item in enumerate(items))
            return
        pending: dict[Future, int] = {}
        left = iter(enumerate(items))
        try:
            while True:
                for position, item in left:
                    pending[self.executor.submit(function, item)] = position
                    if len(pending) >= AHEAD * self.count:
                        break
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def workers_of(count: int = 1, dask: str | None = None) -> Iterator[Workers]:
    """Provide `count` local workers, or those of the Dask scheduler at the address `dask`.

    Raises:
        MissingExtraError: `dask` is given and distributed is not installed.
        ConfigError: no scheduler answers there, or it has no workers.
    """
    if dask is not None:
        with _cluster(dask) as found:
            yield found
        return
    if count <= 1:
        yield Workers(None, 1)
        return
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="scan") as executor:
            yield Workers(executor, count)
    finally:
        close_children(keep=1)


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Workers]:
    try:
        from distributed import Client
    except ImportError:
        raise MissingExtraError("scan --dask", "distributed", "cluster") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at '{address}' ({type(error).__name__}); give tcp://HOST:PORT"
        ) from None
    with client:
        count = sum(client.nthreads().values())
        if not count:
            raise ConfigError(
                f"the Dask scheduler at '{address}' has no workers; start some with: dask worker {address}"
            )
        with client.get_executor(pure=False) as executor:
            yield Workers(executor, count)
