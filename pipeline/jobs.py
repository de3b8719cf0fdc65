"""Work as a Ray job: submitted to a cluster's head, followed, found again after this process died, and stopped.

The job is a process on the head (`pipeline/job.py`), so the work lives on when whoever submitted it is gone. This
package's code goes with it; all else, PyTorch and credentials included, has to be on the cluster's machines.
"""

import contextlib
import importlib.metadata
import json
import logging
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.cluster import check_cluster
from pipeline.errors import ClusterError, PipelineError, StorageError, Terminated, TrainingError, first_line, restored
from pipeline.lease import ask_to_stop, lease_key
from pipeline.placement import ClusterConfig
from pipeline.progress import OnEpoch, OnNow, followed
from pipeline.signals import on_signal
from pipeline.storage import Store, sha256
from pipeline.train import Training, find_training, staging

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
POLL_S = 0.5
# How long a head that does not answer is waited for, once it has: Kubernetes takes 5 minutes to give up a machine.
OUTAGE_S, SAY_AFTER_S = 900, 10
STOP_S = 8  # how long a job may take to end by itself, a training to leave its checkpoint, before it is stopped
DYING_S = 20  # a job that is stopped so soon after it was found was being stopped already
LOST_JOBS = 3  # how many jobs of one work may vanish with the head they ran on
CODE = ("lenet", "pipeline")
# What decides the numbers, beside the code that comes with the job.
SAME = ("torch", "ray", "numpy", "pyarrow")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Result]):
    """What a job does. Its name is that of no other work on the cluster; `asked` is what pipeline/job.py takes.

    `find` is what it has left in the store, None before it has finished. `ask_stop` lets this job end by itself, for
    which it has STOP_S, and says whether it can; `followed` is what goes on here meanwhile.
    """

    name: str
    asked: dict[str, Any]
    metadata: dict[str, str]
    find: Callable[[], Result | None]
    ask_stop: Callable[[str], bool] = lambda job: False
    followed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


class Vanished(ClusterError):  # noqa: N818  # as it is told
    """The head, started again, knows nothing of the job."""


class Client(JobSubmissionClient):
    """Ray's own, which would wait for ever for a head that went away in the middle of an answer. Once connected, all
    that goes wrong is a ClusterError."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._do_request(*args, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), **kwargs)
        except (requests.RequestException, AuthenticationError) as error:
            if self._server_ray_version is None:
                raise  # `connect` says what it means
            raise ClusterError(f"{self._address} does not answer: {first_line(error)}") from None

    def _raise_error(self, r: requests.Response) -> NoReturn:
        said = r.text.strip() or "no reason given"
        kind = Vanished if "does not exist" in said else ClusterError
        raise kind(f"{self._address} says {r.status_code}: {said.splitlines()[0]}")


def connect(address: str) -> Client:
    """A client for the head whose dashboard is at http://host:port. Raises ClusterError with one line for an address
    where there is none, a token that is not its, and another version of Ray."""
    try:
        client = Client(address)
    except AuthenticationError as error:
        raise ClusterError(
            f"ray_address={address!r}: refuses the token ({first_line(error)}); if a Ray dashboard listens there, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its cluster's"
        ) from None
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"ray_address={address!r}: no Ray dashboard answers there ({first_line(error)}); give http://host:port of "
            "the head's dashboard, started with --dashboard-host 0.0.0.0 and with Ray's default extra installed"
        ) from None
    theirs = client._server_ray_version
    if theirs != ray.__version__:
        raise ClusterError(
            f"ray_address={address!r}: the cluster runs Ray {theirs} and this process {ray.__version__}; "
            "install the same version on both"
        )
    return client


def check(cluster: ClusterConfig) -> None:
    """Before any work: what `connect` raises, or `check_cluster` where Ray is connected to."""
    if cluster.by_job:
        connect(str(cluster.ray_address))
    else:
        check_cluster(cluster)


def versions() -> dict[str, str]:
    """Of Python and of the packages that have to be the same on the cluster as where the run was begun.

    Without the patch of Python, as only code and JSON go from there to here, and without a package's build, such as the
    +cpu of torch's wheels for CPUs.
    """
    python = platform.python_version().rpartition(".")[0]
    return {"python": python} | {name: importlib.metadata.version(name).partition("+")[0] for name in SAME}


def require_versions(asked: dict[str, str]) -> None:
    """ClusterError unless this machine has these versions."""
    here = versions()
    other = [f"{name} {here[name]}, not {version}" for name, version in asked.items() if here[name] != version]
    if other:
        raise ClusterError(f"the cluster has {'; '.join(other)}; install the same versions as where the run begins")


def run_job(address: str, work: Work[Result]) -> Result:
    """Have it done on the cluster at `address`, by the job that is at it, or else by a new one.

    When this call ends before the job, by Ctrl-C, SIGTERM or cancellation, the job is stopped. Raises what was raised
    in the job, and ClusterError when the cluster is gone.
    """
    lost = 0
    while (done := work.find()) is None:
        client = connect(address)
        begun, looked = _find(client, work), time.monotonic()
        job = begun or _submit(client, work)
        log.info("following job %s", job)
        with work.followed(), _stopped_with_us(client, work, job):
            status = _wait(client, work, job)
        if status is None:
            lost += 1
            if lost > LOST_JOBS:
                raise ClusterError(f"ray_address={address!r}: {lost} jobs {work.name} vanished; see the head's log")
            log.warning("the head has forgotten job %s; submitting another", job)
        elif status != JobStatus.SUCCEEDED:
            error = _error(client, job, status)
            stopped = status == JobStatus.STOPPED or isinstance(error, Terminated)
            if begun is None or not stopped or time.monotonic() - looked > DYING_S:
                raise error
            log.warning("job %s was being stopped when it was found; submitting another", job)
        elif work.find() is None:
            where = work.metadata["storage"]
            raise TrainingError(f"job {job} ended well and left nothing in {where}; is that the store it uses?")
    return done


def training(
    store: Store,
    run_id: str,
    parameters: dict[str, Any],
    dataset: str,
    on_epoch: OnEpoch = lambda epoch: None,
    on_now: OnNow = lambda now: None,
) -> Work[Training]:
    """Training the run with these parameters on the dataset in this folder. Asked to stop, it leaves a checkpoint."""
    return Work(
        # Runs of two stores may have the same name, and share a cluster.
        name=f"lenet-{run_id}-{sha256(store.url.encode())[:8]}",
        asked={"work": "train", "parameters": parameters, "dataset": dataset, "versions": versions()},
        metadata={"run_id": run_id, "storage": store.url},
        find=lambda: find_training(store, run_id),
        ask_stop=lambda job: ask_to_stop(store, lease_key(staging(run_id)), job),
        followed=lambda: followed(store, staging(run_id), on_epoch, on_now),
    )


def stop(address: str, work: Work[Any], before: datetime) -> bool:
    """Stop the job that is at it, whoever submitted it, if that was before then; whether there was one. Raises
    ClusterError."""
    client = connect(address)
    jobs = _jobs(client, work)
    job = _running({number: found for number, found in jobs.items() if _begun(found) < before})
    if job is not None:
        _stop(client, work, job)
    return job is not None


def _begun(found: JobDetails) -> datetime:
    return datetime.fromtimestamp((found.start_time or 0) / 1000, UTC)


def _find(client: Client, work: Work[Any]) -> str | None:
    """The job that has not ended."""
    return _running(_jobs(client, work))


def _jobs(client: Client, work: Work[Any]) -> dict[int, JobDetails]:
    """All jobs of this work that the head knows, by their numbers."""
    named = [(*str(found.submission_id).rpartition("-"), found) for found in client.list_jobs()]
    return {int(number): found for name, _, number, found in named if name == work.name and number.isdigit()}


def _running(jobs: dict[int, JobDetails]) -> str | None:
    return next((str(found.submission_id) for found in jobs.values() if not found.status.is_terminal()), None)


def _submit(client: Client, work: Work[Any]) -> str:
    """A new job, or one that somebody else has submitted meanwhile. Numbered, so that of two who submit at once one is
    refused, and follows the other's."""
    jobs = _jobs(client, work)
    if other := _running(jobs):
        return other
    name = f"{work.name}-{1 + max(jobs, default=0)}"  # not their count: any of them may have been deleted
    package = Path(__file__).parents[1]
    try:
        job: str = client.submit_job(
            entrypoint=f"python -m pipeline.job {shlex.quote(json.dumps(work.asked | {'job': name}))}",
            submission_id=name,
            runtime_env={"py_modules": [str(package / name) for name in CODE]},
            metadata=work.metadata,
        )
    except ClusterError as error:
        if other := _find(client, work):
            return other
        raise ClusterError(f"job {work.name} was refused: {error}") from None
    return job


def _wait(client: Client, work: Work[Any], job: str) -> JobStatus | None:
    """How the job ended, or has as good as ended; None if the head, started again, knows nothing of it. Its output goes
    to the log."""
    answered = time.monotonic()
    shown, said = 0, False
    while True:
        try:
            status = client.get_job_status(job)
            lines = client.get_job_logs(job).splitlines()
        except Vanished:
            return None
        except ClusterError as error:
            silent = time.monotonic() - answered
            if silent > OUTAGE_S:
                raise ClusterError(
                    f"the cluster has not answered for {OUTAGE_S} s ({error}); the same again goes on once it is back"
                ) from None
            if silent > SAY_AFTER_S and not said:
                log.warning("%s; waiting up to %d minutes", error, OUTAGE_S // 60)
                said = True
        else:
            answered, said = time.monotonic(), False
            for line in lines[shown:]:
                if not line.startswith("{") and "Running entrypoint" not in line:  # Ray repeats the whole request
                    log.info("job: %s", line)
            shown = len(lines)
            if status.is_terminal():
                return status
        with contextlib.suppress(StorageError):  # the next look may succeed
            if work.find() is not None:
                return JobStatus.SUCCEEDED  # what the job has left to do, to clear away, takes it another second
        time.sleep(POLL_S)


@contextlib.contextmanager
def _stopped_with_us(client: Client, work: Work[Any], job: str) -> Iterator[None]:
    """A job that nobody waits for any more is stopped."""

    def terminate() -> None:
        raise Terminated

    with on_signal(signal.SIGTERM, terminate):
        try:
            yield
        except ClusterError:
            raise
        except BaseException:
            with contextlib.suppress(PipelineError):
                _stop(client, work, job)
            raise


def _stop(client: Client, work: Work[Any], job: str) -> None:
    log.warning("stopping job %s", job)
    with contextlib.suppress(Vanished):
        try:
            if work.ask_stop(job):
                give_up = time.monotonic() + STOP_S
                while time.monotonic() < give_up and not client.get_job_status(job).is_terminal():
                    time.sleep(POLL_S / 2)
        except StorageError as error:
            log.warning("job %s cannot be asked to end by itself: %s", job, error)
        client.stop_job(job)


def _error(client: Client, job: str, status: JobStatus) -> BaseException:
    """What the job's last line says was raised there."""
    with contextlib.suppress(ClusterError):
        lines = [line for line in client.get_job_logs(job).splitlines() if line.strip()]
        if lines and lines[-1].startswith("{"):
            said = json.loads(lines[-1])
            if said["error"] != Terminated.__name__:
                return restored(said["error"], said["args"], said.get("may_pass"))  # a job of before does not say it
            if status != JobStatus.STOPPED:  # else it is chance that it said so: Ray kills it after 3 s
                return Terminated()
        message = client.get_job_info(job).message or (lines[-1] if lines else "no output")
        message = message.partition(", last available logs")[0]  # they begin with the whole request
        # Killed, perhaps, on a head without memory: then another job goes on. One that somebody stopped does not.
        kind = ClusterError if status == JobStatus.FAILED else TrainingError
        return kind(f"job {job} has {str(status).lower()}: {' '.join(message.split())[:400]}")
    return ClusterError(f"job {job} has {str(status).lower()}, and the head does not say why")
