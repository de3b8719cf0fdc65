"""What tests of lenet share: recording as on a GPU, here."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch import Tensor


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording is replayed by doing the work again, into the same tensor."""

    def record(work: Callable[[], Tensor | None]) -> tuple[SimpleNamespace, Tensor | None]:
        result = work()

        def replay() -> None:
            again = work()
            if result is not None and again is not None:
                result.copy_(again)

        return SimpleNamespace(replay=replay), result

    monkeypatch.setattr("lenet.step.record", record)
    monkeypatch.setattr("lenet.optimize.record", record)
