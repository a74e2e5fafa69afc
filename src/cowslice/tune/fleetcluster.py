"""A fleet studied on a cluster of dask.distributed, whose workers read images and traces where they are.

It does not know what a study is. What must hold: a worker that is lost costs time only; a disk that takes several
workers with it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from cowslice.errors import BadOption, CowsliceError, StorageError
from cowslice.tune.calibrate import Calibration
from cowslice.tune.fleetlist import Broken
from cowslice.tune.fleetstudy import Job, Studied, broken, study

PATIENCE = 30  # seconds for the scheduler to answer, and for a first worker to come

Outcome = Studied | Broken
OnDone = Callable[[int], None]


def _dask() -> Any:
    try:
        import distributed
    except ImportError:
        raise BadOption("--scheduler needs dask.distributed",
                        hint="Install it with: pip install 'cowslice[fleet]'") from None
    return distributed


class ClusterCrew:
    """The workers of the scheduler at `address`, such as "tcp://host:8786". A context; the cluster outlives it.

    Raises BadOption without dask.distributed or for what is no address, StorageError where nobody answers.
    """

    def __init__(self, address: str, *, patience: float = PATIENCE) -> None:
        self._dask = _dask()
        try:
            self._client = self._dask.Client(address, timeout=patience, set_as_default=False)
        except ValueError as error:
            raise BadOption(f"--scheduler is '{address}', expected an address such as tcp://host:8786 ({error})"
                            ) from None
        except (OSError, TimeoutError) as error:
            raise StorageError(f"cannot reach the scheduler at '{address}': {error}", filename=address) from error
        try:
            self._client.wait_for_workers(1, timeout=patience)
        except TimeoutError:
            self._client.close()
            raise StorageError(f"the scheduler at '{address}' has no worker, and none came within {patience} seconds",
                               filename=address) from None
        self._address = address

    def __enter__(self) -> ClusterCrew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def measure(self, function: Callable[[Sequence[str]], Calibration], names: Sequence[str]) -> Calibration:
        """Run it on one of the workers."""
        future = self._client.submit(function, list(names), pure=False)
        try:
            measured: Calibration = future.result()
        except CowsliceError:
            raise
        except Exception as error:
            raise StorageError(f"the cluster at '{self._address}' cannot measure the storage: {error!r}") from error
        return measured

    def run(self, jobs: Sequence[Job], on_done: OnDone) -> list[Outcome]:
        """Study all; outcomes stand in the order of the jobs. `on_done` is told how many are done."""
        futures = self._client.map(study, jobs, pure=False)
        numbers = {future.key: number for number, future in enumerate(futures)}
        done: dict[int, Outcome] = {}
        try:
            for future in self._dask.as_completed(futures, loop=self._client.loop):
                number = numbers[future.key]
                done[number] = self._outcome(future, jobs[number])
                on_done(len(done))
        finally:
            self._client.cancel(futures)
        return [done[number] for number in range(len(jobs))]

    def _outcome(self, future: Any, job: Job) -> Outcome:
        try:
            outcome: Outcome = future.result()
        except Exception as error:
            if future.cancelled():
                raise StorageError(f"the scheduler at '{self._address}' went away") from error
            return broken(job.member, StorageError(
                f"'{job.member.image}' could not be studied: {type(error).__name__}: {error}",
                hint="Every worker needs this version of cowslice, and enough memory."))
        return outcome
