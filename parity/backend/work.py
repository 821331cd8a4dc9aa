"""The handle that a caller gets: wait for the result, ask whether it is there, or take a future."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Work

from parity.backend.call import Call, is_called_by_the_user
from parity.backend.engine import Engine


class Finished(Work):
    """Of a call that was waited for inside of it."""

    def __init__(self, outputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._outputs = list(outputs)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def exception(self) -> None:
        return None

    def result(self) -> list[Tensor]:
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._outputs)
        return future


class Handle(Finished):
    """Of calls under way. What they bring stays out of sight until one asks for it."""

    def __init__(
        self,
        engine: Engine,
        calls: Sequence[Call],
        outputs: Sequence[Tensor],
        phrase: Callable[[], str],
        group: object,
    ) -> None:
        super().__init__(outputs)
        self._engine, self._calls = engine, list(calls)
        self._promise: torch.futures.Future[None] = torch.futures.Future()
        self._future: torch.futures.Future[list[Tensor]] | None = None
        self._error: Exception | None = None
        self._is_over = False
        # What torch does with its own handles is its affair: DDP's join drops one on purpose.
        if is_called_by_the_user():
            engine.unwaited[id(self)] = group, phrase
        else:
            for call in calls:
                if call.guard is not None:
                    call.guard.spare_outputs()

    def wait(self, timeout: timedelta | None = None) -> bool:
        for call in self._calls:
            self._engine.wait(call)
        self._hand_over()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        if all(self._engine.poll(call) for call in self._calls):
            self._hand_over()
            return True
        return False

    def is_success(self) -> bool:
        return self.is_completed()

    def _hand_over(self) -> None:
        """Once: check that nobody has touched the tensors, and put the results there."""
        with self._engine.changed:
            if self._is_over:
                return
            self._is_over = True
            self._engine.unwaited.pop(id(self), None)
            for call in self._calls:
                call.hand_over(self._future is not None)

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        if self._future is None:
            self._future = self._promise.then(self._kept)
            self._engine.promise(self._calls, self._keep, self._fail)
        return self._future

    def _kept(self, _: torch.futures.Future[None]) -> list[Tensor]:
        """What the future brings. Only what is raised here is a failure to C++ too: the exception
        that `set_exception` leaves there DDP takes for tensors, and dies of it.
        """
        if self._error is not None:
            raise self._error
        return self._outputs

    def _keep(self) -> None:
        self._hand_over()
        self._promise.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._is_over, self._error = True, error
        self._promise.set_result(None)

    def _source_rank(self) -> int:
        return self._calls[0].source

    source_rank = _source_rank

    def __del__(self) -> None:
        if not self._is_over and self._future is None:
            self._engine.forget(id(self))


class Together(Finished):
    """Several calls as one."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        super().__init__()
        self._handles = handles

    def wait(self, timeout: timedelta | None = None) -> bool:
        return all([handle.wait(timeout) for handle in self._handles])

    def is_completed(self) -> bool:
        return all([handle.is_completed() for handle in self._handles])
