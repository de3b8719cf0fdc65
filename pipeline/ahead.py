"""Work under way before its result is asked for, a bounded number of tasks at a time: in threads or on Ray alike."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Started = TypeVar("Started")
Result = TypeVar("Result")


def in_order(
    start: Callable[[Task], Started], finish: Callable[[Started], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    """The results in the order of the tasks. `start` begins a task, for `ahead` of them at a time, and `finish` waits
    for one: no more than that is ever begun, however many tasks there are."""
    waiting = iter(tasks)
    running = deque(start(task) for task in islice(waiting, ahead))
    while running:
        result = finish(running.popleft())
        running.extend(start(task) for task in islice(waiting, 1))
        yield result
