"""Many calls side by side on Ray: one task each, which may die without taking the others along. Or without Ray."""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from mada_lab.errors import InputError, require

# Enough for what is passed here, which is small; Ray would reserve a third of the memory.
OBJECT_STORE = 100 * 2**20


class Pool:
    """A context manager that starts Ray when there is something to do, and stops what it has started.

    A session of Ray that is there already is used, and left as it is.

    Args:
        workers: number of calls at the same time, each on one core. 0: one after the other in this process, without
            Ray and without ``on_wait``.
        address: of a cluster of Ray, all of whose machines see the same folders; None: this machine alone.

    Attributes:
        on_wait: called about every second with the names of the calls under way; None: nothing is called.
    """

    on_wait: Callable[[Sequence[str]], None] | None = None

    def __init__(self, workers: int, address: str | None = None) -> None:
        least = 0 if address is None else 1
        allowed = "a positive integer" if least else "a positive integer, or 0 (in this process)"
        require(isinstance(workers, int) and workers >= least, "workers", workers, allowed)
        self._workers, self._address = workers, address
        self._started = False

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            import ray

            ray.shutdown()

    def run(
        self,
        function: Callable[..., str],
        calls: Mapping[str, tuple[Any, ...]],
        on_over: Callable[[str, str], None],
        cuda: bool = False,
    ) -> bool:
        """Call ``function`` with each of the arguments.

        A process that dies is replaced once. What fails then, or raises, does not keep the others from going on.

        Args:
            function: says in a word how it ended. At Ctrl-C, SIGINT is handled in its process.
            calls: arguments by name.
            on_over: called here with the name and that word, or "failed: " and why.
            cuda: the calls share all GPUs evenly.

        Returns:
            Whether all are over; False after Ctrl-C, when those under way have ended. A second one does not wait.
        """
        if not calls:
            return True
        if self._workers == 0:
            return self.run_here(function, calls, on_over)
        try:
            self._start()
            import ray

            resources: dict[str, float] = ray.cluster_resources() if cuda else {}  # type: ignore[no-untyped-call]
            gpus = resources.get("GPU", 0.0)
            task = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / self._workers), max_retries=1)(function)
            waiting, running = iter(calls.items()), dict[Any, str]()
            try:
                while True:
                    # Not all at once: what has not begun needs no calling back at Ctrl-C.
                    for name, values in itertools.islice(waiting, self._workers - len(running)):
                        running[task.remote(*values)] = name
                    if not running:
                        return True
                    for reference in ray.wait(list(running), timeout=None if self.on_wait is None else 1.0)[0]:
                        on_over(running.pop(reference), _outcome(reference))
                    if self.on_wait is not None:
                        self.on_wait(list(running.values()))
            except KeyboardInterrupt:
                for reference in running:
                    ray.cancel(reference)
                if running:
                    ray.wait(list(running), num_returns=len(running))
                return False
        except KeyboardInterrupt:
            return False

    def run_here(
        self,
        function: Callable[..., str],
        calls: Mapping[str, tuple[Any, ...]],
        on_over: Callable[[str, str], None],
        cuda: bool = False,  # noqa: ARG002
    ) -> bool:
        """Do what :meth:`run` does, one call after the other in this process, which ends where a call kills it."""
        for name, values in calls.items():
            try:
                outcome = function(*values)
            except KeyboardInterrupt:
                return False
            except Exception as error:
                outcome = _failure(error)
            if outcome == "interrupted":
                return False
            on_over(name, outcome)
        return True

    def _start(self) -> None:
        # Ray reads these when it is imported or started. Without the second, it hides the GPUs from tasks that ask for
        # none, and says so in a warning. Without the third, what does not fit into memory is begun again without end.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_task_oom_retries", "1")
        try:
            import ray
        except ModuleNotFoundError as error:
            remedy = "pip install 'mada-optim[lab]', or do without it by --workers 0"
            raise InputError(f"{error.name} is missing: {remedy}") from None
        if ray.is_initialized():
            return
        host, _, port = (self._address or "").rpartition(":")
        if port.isdigit() and "://" not in host:
            try:
                # Ray would try for minutes.
                socket.create_connection((host, int(port)), timeout=10).close()
            except OSError as error:
                raise InputError(f"address must be that of a Ray cluster, got {self._address!r}: {error}") from None
        local = self._address is None  # what follows would be refused by a cluster, which has its own
        self._started = True
        try:
            ray.init(
                self._address or "local",
                num_cpus=self._workers if local else None,
                object_store_memory=OBJECT_STORE if local else None,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"Ray cannot be used at address {self._address or 'local'!r}: {reason}") from None


def _failure(error: BaseException) -> str:
    return f"failed: {error}".splitlines()[0]


def _outcome(reference: Any) -> str:
    import ray

    try:
        word: str = ray.get(reference)
        return word
    except ray.exceptions.RayTaskError as error:
        return _failure(error.cause or error)
    except ray.exceptions.OutOfMemoryError:
        return "failed: there was not enough memory, twice; try fewer workers"
    except ray.exceptions.RayError:
        return "failed: its process died twice"
