"""Several processes that train one model: who they are, what they tell one another, and what happens when one is lost.

A launcher starts the processes and says in the environment which is which (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT, as torchrun does). Rank 0 is the first: it alone writes files. Values travel as tensors or as JSON, nothing
is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, distributed

from geomed_mae import errors
from geomed_mae.errors import ConfigError, GeomedError, OutputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets. LOCAL_WORLD_SIZE, the processes of this machine, is optional."""

THREADS = "OMP_NUM_THREADS"
"""Threads of each process where it is set, as torchrun does (to 1, unless told otherwise)."""

LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "tcpstore", "process group", "peer")
"""Words of the plain RuntimeErrors with which torch says that another process gave no answer."""

CHECKPOINTS = (
    "The checkpoints are whole: start all processes again with --resume (train.timeout_s says how long they wait)"
)
"""How a training goes on after a process was lost."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run, seen by one of them. By default there is one, and nothing is sent anywhere.

    Attributes:
        rank: number of this process, 0 to world - 1.
        world: number of processes.
        local_rank: number of this process on its machine, which is that of its GPU.
        local_world: processes on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Self:
        """Read the launcher's variables; without them this process is alone.

        Raises:
            ConfigError: some are set and others are not, or one is no number.
        """
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_RANK", 0 if world == 1 else ""))
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        except ValueError:
            found = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES[:3])
            raise ConfigError(f"a launcher sets RANK, WORLD_SIZE and LOCAL_RANK to numbers; found {found}") from None
        if not 0 <= rank < world:
            raise ConfigError(f"RANK {rank} is not below WORLD_SIZE {world}")
        return cls(rank, world, local, local_world)

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    def share(self, count: int, what: str) -> int:
        """Return this process's share of `count`.

        Raises:
            ConfigError: it cannot be shared evenly.
        """
        if count % self.world:
            raise ConfigError(f"{what} {count} cannot be shared by {self.world} processes; make it a multiple of them")
        return count // self.world

    def device(self, name: str) -> torch.device:
        """Return the device of `train.device` for this process: with several, each has a GPU of its own.

        Raises:
            ConfigError: there are fewer GPUs than processes on this machine.
        """
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        if self.alone or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_world} processes on a machine with {torch.cuda.device_count()} GPUs; start one process a "
                "GPU, or set train.device=cpu"
            )
        return torch.device("cuda", self.local_rank)

    @contextlib.contextmanager
    def joined(self, device: torch.device, timeout_s: int, *, again: str = CHECKPOINTS) -> Iterator[None]:
        """Connect the processes for as long as the body runs; a process that gives no answer for `timeout_s` is lost.

        Raises:
            OutputError: another process was lost, while connecting or later; `again` says how to go on.
        """
        if self.alone:
            yield
            return
        missing = [name for name in VARIABLES if name not in os.environ]
        if missing:
            raise ConfigError(f"WORLD_SIZE is {self.world} but {', '.join(missing)} is not set; start it with torchrun")
        if device.type == "cpu" and THREADS not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.local_world))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _losses_named(timeout_s, again):
            # JSON travels through gloo, on the CPU, also where gradients go from GPU to GPU.
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                rank=self.rank,
                world_size=self.world,
            )
            try:
                yield
            finally:
                distributed.destroy_process_group()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes, the same bits on each."""
        if not self.alone:
            distributed.all_reduce(values)
            values = values / self.world
        return values

    def add_up(self, values: Tensor) -> None:
        """Replace values by their sums over all processes."""
        if not self.alone:
            distributed.all_reduce(values)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if not self.alone:
            self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON value of every process, in the order of ranks, on each of them."""
        if self.alone:
            return [value]
        own = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        distributed.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(sizes))
        padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in range(self.world)]
        distributed.all_gather(texts, padded)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Let the first process do something, and return its result (a JSON value) on all of them.

        Raises:
            GeomedError: what the action raised, on every process.
        """
        if self.alone:
            return action()
        result, failure = None, None
        if self.first:
            try:
                result = action()
            except GeomedError as error:
                failure = error
        told = self.gather({"result": result, "error": _as_json(failure)} if self.first else None)[0]
        if failure is not None:
            raise failure
        if told["error"] is not None:
            raise _from_json(*told["error"])
        return told["result"]

    def gather_or_raise(self, value: Any, failure: GeomedError | None) -> list[Any]:
        """Return the JSON value of every process, or raise on all of them what one of them has met.

        Raises:
            GeomedError: this process's failure, else that of the first which has one.
        """
        told = self.gather({"value": value, "error": _as_json(failure)})
        if failure is not None:
            raise failure
        for one in told:
            if one["error"] is not None:
                raise _from_json(*one["error"])
        return [one["value"] for one in told]

    def check_same(self, value: Any, message: str) -> None:
        """Make sure that a JSON value is the same on all processes.

        Raises:
            ConfigError: it is not; `message` says what that means.
        """
        if any(other != value for other in self.gather(value)):
            raise ConfigError(message)


def _as_json(error: GeomedError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, str(error)]


def _from_json(name: str, message: str) -> GeomedError:
    """Rebuild an error that another process has raised: one of our classes, or the root of them."""
    kind = getattr(errors, name, GeomedError)
    if isinstance(kind, type) and issubclass(kind, GeomedError) and "__init__" not in vars(kind):
        return kind(message)
    rebuilt = GeomedError(message)
    rebuilt.exit_code = getattr(kind, "exit_code", GeomedError.exit_code)
    return rebuilt


@contextlib.contextmanager
def _losses_named(timeout_s: int, again: str) -> Iterator[None]:
    """Turn torch's many ways of saying that another process is gone into one error."""
    known = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, GeomedError) or not (
            isinstance(error, known) or any(word in str(error).lower() for word in LOST)
        ):
            raise
        log.debug("another process was lost: %s", error)
        raise OutputError(
            f"another process of this run ended, or gave no answer for {timeout_s} s; what it said last tells why. "
            f"{again}"
        ) from error
