"""Ray Train as it is used here: what it does beside the training, a small model would wait for.

The control loop runs in this process, not in an actor of its own. As an actor it would first import PyTorch, 4 to 6 s
of a core, before any worker is asked for; it would live no longer than this process either.
"""

import asyncio
import logging
import re
import signal
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import Result
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from pipeline import imports
from pipeline.cluster import use_interface_of_ray
from pipeline.errors import PipelineError, Terminated
from pipeline.placement import placeable
from pipeline.signals import on_signal

log = logging.getLogger(__name__)

WITHOUT_WORKERS = (InitializingState, SchedulingState, RestartingState, ReschedulingState)
DIED = "its worker process has died"
OUT_OF_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),[^)]*\) was (\S+) used / (\S+) limit")


def mistake_of(failure: Exception) -> PipelineError | None:
    """The error among those of the ranks that a user has to mend, as another start would meet it again."""
    errors = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
    return next((error for error in errors if isinstance(error, PipelineError) and not error.may_pass), None)


def cause_of(error: BaseException) -> str:
    """Why a worker has failed: what Ray says of its machine's memory, or else the last line, an exception's message. Of
    several workers, each by its rank."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return "; ".join(f"rank {rank}: {cause_of(cause)}" for rank, cause in sorted(error.worker_failures.items()))
    if memory := OUT_OF_MEMORY.search(text := str(error)):
        host, used, limit = memory.groups()
        return f"{host} has run out of memory ({used} of {limit} used): ask for fewer workers, or more memory"
    if DIED in text:  # a page that guesses why
        return "its process has died: it was killed, or it crashed"
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def _interrupt() -> None:
    raise KeyboardInterrupt


class Trainer(TorchTrainer):
    """Trains on a local Ray, or on a cluster whose hosts may be several. While there are no workers that could hear
    that the end was asked for, `fit` raises Terminated. `kept` says how many checkpoints there were."""

    def __init__(
        self,
        *args: Any,
        local: bool,
        timeout_s: int,
        end_asked: Callable[[], bool],
        kept: Callable[[], int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, torch_config=(TorchConfig if local else _SeveralHosts)(timeout_s=timeout_s), **kwargs)
        self.local, self.end_asked, self.kept = local, end_asked, kept

    def _create_default_callbacks(self) -> list[Any]:
        # Each starts an actor, 2 s of a core. Ray Data's manager serves datasets, and there are none; the cleaner frees
        # the workers' places when the control loop has died, which Ray does by itself when this process has.
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        needed = [callback for callback in callbacks if not isinstance(callback, idle)]
        return needed if self.local else [*needed, _Lookout()]  # a local Ray's machine is not taken away

    def _initialize_and_run_controller(self, scaling_policy: Any, failure_policy: Any, **asked: Any) -> Result:
        if self.local and isinstance(scaling_policy, FixedScalingPolicy):
            scaling_policy = _NothingToScale(scaling_policy.scaling_config)
        if isinstance(scaling_policy, ElasticScalingPolicy):
            scaling_policy = Elastic(scaling_policy.scaling_config)
        logging.getLogger(TrainController.__module__).setLevel(logging.CRITICAL)  # of pages; what it raises is told
        logging.getLogger(PreemptionWatcher.__module__).setLevel(logging.ERROR)  # it would tell of every head away
        failure_policy = Failures(failure_policy.failure_config, self.kept)
        controller = _Controller(scaling_policy=scaling_policy, failure_policy=failure_policy, **asked)
        controller.end_asked = self.end_asked
        try:
            # asyncio's own handler of Ctrl-C is heard where the loop waits: nowhere, while looking at the workers takes
            # longer than the pause between two looks.
            with on_signal(signal.SIGINT, _interrupt):
                asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        except BaseException:
            if workers := controller.get_worker_group():
                workers.abort()  # type: ignore[no-untyped-call]
            raise
        result: Result = controller.get_result()
        return result


class _Watcher(PreemptionWatcher):
    def _on_drain_change(self, drained: dict[str, int]) -> None:
        ranks = sorted(rank for node in drained for rank in self._failure_domain_map[node])
        if ranks:
            log.warning("the machine of rank %s is about to be taken away", ", ".join(map(str, ranks)))
        super()._on_drain_change(drained)


class _Lookout(PreemptionCallback):
    """Tells the workers, from this process and not from an actor, when a machine of theirs is soon taken away."""

    here: PreemptionWatcher | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._stop_watcher()
        ranks: dict[str, list[int]] = {}
        for worker in worker_group.get_workers():
            ranks.setdefault(worker.metadata.node_id, []).append(worker.distributed_context.world_rank)
        actors = {worker.distributed_context.world_rank: worker.actor for worker in worker_group.get_workers()}
        self.here = _Watcher(ranks, self._poll_interval_s, actors)

    def _stop_watcher(self) -> None:
        if self.here is not None:
            self.here._stop_event.set()
            self.here = None


class _Workers(WorkerGroup):
    def _start(self) -> None:
        # Of workers that die while they meet, Ray Train would keep the places, for which their successors would wait
        # for ever. And it would start them again without end, or, by when they die, not once: we count them as others.
        try:
            super()._start()  # type: ignore[no-untyped-call]
        except BaseException as error:
            if self._worker_group_state is not None:
                self._worker_group_state.shutdown()  # type: ignore[no-untyped-call]
                self._clear_state()  # type: ignore[no-untyped-call]
            if isinstance(error, (RayError, WorkerGroupStartupFailedError)):
                raise WorkerGroupError(cause_of(error.__cause__ or error), {}) from error
            raise

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        # As Ray Train's own, but that the workers import in our way before, and have no handle of the control loop, of
        # which they would ask for the checkpoints of before: it is no actor.
        ray.get([worker.actor.execute.remote(imports.training) for worker in workers])
        ray.get([
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ])  # fmt: skip
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers
    end_asked: Callable[[], bool]

    async def _step(self) -> Any:
        if isinstance(self.get_state(), WITHOUT_WORKERS) and self.end_asked():
            raise Terminated
        return await super()._step()


class Failures(DefaultFailurePolicy):
    """As Ray Train's own, but that it says why all start again or wait, does not have them meet a user's mistake again,
    and counts failures since the last checkpoint: in weeks, more machines are lost than in any one epoch."""

    def __init__(self, failure_config: FailureConfig, kept: Callable[[], int]) -> None:
        super().__init__(failure_config)
        self.kept, self.kept_before = kept, 0
        self.said = ""

    def _is_retryable_error(self, training_failed_error: TrainingFailedError) -> bool:
        return mistake_of(training_failed_error) is None and super()._is_retryable_error(training_failed_error)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if (kept := self.kept()) != self.kept_before:
            self.kept_before, self._worker_group_failures = kept, 0
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            cause = getattr(training_failed_error, "controller_failure", None)
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                self._say_what_is_free(cause.num_workers)
            else:
                log.warning("%s. All ranks start again, from the last checkpoint", cause_of(training_failed_error))
        return decision

    def _say_what_is_free(self, workers: int) -> None:
        free, there = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
        parts = [f"{free.get(name, 0):g} of {there[name]:g} {name}s" for name in ("CPU", "GPU") if name in there]
        said = f"waiting for room for {workers} workers: of Ray's, {' and '.join(parts) or 'no CPUs'} are free"
        if said != self.said:
            log.warning(said)
        self.said = said


class Elastic(ElasticScalingPolicy):
    """As Ray Train's own, but that it finds room for five workers of 0.2 CPUs on one: 1.0 // 0.2 is 4."""

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        wanted = self.scaling_config._resources_per_worker_not_none
        room = placeable(reserved_resources.values(), wanted["CPU"], wanted.get("GPU", 0))
        return min(room, int(self.scaling_config.max_workers))


class _NothingToScale(FixedScalingPolicy):
    """Asks nobody for machines: there is this one. Asking would start an actor, 2 s of a core."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _SeveralHostsBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(use_interface_of_ray)
        super().on_start(worker_group, backend_config)


class _SeveralHosts(TorchConfig):
    """On a cluster: each worker talks to the others by the address that its host has in Ray."""

    @property
    def backend_cls(self) -> type[_SeveralHostsBackend]:
        return _SeveralHostsBackend
