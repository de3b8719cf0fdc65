"""Proves that all that was before a crash is counted where it is decided what becomes of it."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun, State
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending, Running, Suspended

from flows.crashes import (
    FORGOTTEN,
    LIVES,
    SETTLED,
    Crash,
    cancelled_at,
    to_cancel,
    to_give_up,
    to_revive,
    to_suspend,
    unbegun,
)


def test_what_becomes_of_a_crash_depends_on_all_that_was_before_it() -> None:
    now, moment = datetime.now(UTC), timedelta(seconds=1)
    scheduled, crash = [AwaitingRetry(), Pending(), Running()], Crashed()

    def crashed(lives: int, *before: State[Any], ago: timedelta = SETTLED) -> Crash:
        run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), run_count=lives, state=Crashed(timestamp=now - ago))
        return Crash(run, [*before, crash])

    good = [
        crashed(1, *scheduled),
        crashed(LIVES - 1, *scheduled, crash, *scheduled, crash, *scheduled),
        crashed(1, *scheduled, ago=FORGOTTEN),
        crashed(1, *scheduled, Cancelling(), Cancelled(), *scheduled),  # somebody has thought better of it
        crashed(1, *scheduled, Suspended(), *scheduled),  # somebody has resumed it
        crashed(0, AwaitingRetry(), Pending()),
        crashed(0, AwaitingRetry(), Pending(), crash),
    ]
    hopeless = [
        crashed(LIVES, *scheduled),
        crashed(LIVES + 1, *scheduled),
        crashed(1, *scheduled, ago=FORGOTTEN + moment),
        crashed(0, AwaitingRetry(), Pending(), ago=FORGOTTEN + moment),
        crashed(0, AwaitingRetry(), Pending(), crash, AwaitingRetry(), Pending()),
    ]
    cancelled = [
        crashed(lives, *scheduled, *way, ago=ago)
        for lives in (1, LIVES)
        for way in ([Cancelling()], [Cancelled()], [Cancelling(), Cancelled(), crash])
        for ago in (SETTLED, FORGOTTEN + moment)
    ]
    suspended = [
        crashed(lives, *scheduled, Suspended(), *again, ago=ago)
        for lives in (1, LIVES)
        for again in ([], [crash])
        for ago in (SETTLED, FORGOTTEN + moment)
    ]
    every = [*cancelled, *suspended, *good, *hopeless]
    assert to_revive(every, now) == [found.run.id for found in good]
    assert to_give_up(every, now) == [found.run for found in hopeless]
    assert to_suspend(every) == suspended
    assert to_cancel(every) == [found.run.id for found in cancelled]


def test_a_cancellation_and_beginnings_in_vain_count_from_when_it_was_scheduled_and_ran_last() -> None:
    first, second = Cancelling(), Cancelled()
    assert cancelled_at([AwaitingRetry(), Running(), first, Crashed(), second]) == first.timestamp
    assert cancelled_at([Cancelled(), AwaitingRetry(), Running(), second]) == second.timestamp
    assert cancelled_at([Cancelled(), AwaitingRetry()]) is None
    assert unbegun([AwaitingRetry(), Running(), Crashed(), AwaitingRetry(), Pending(), AwaitingRetry()]) == 2
