"""Proves pipeline/jobs.py on the stack's own Ray: what cannot work is one line, within 30 s, and a run has one job."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray
from ray.job_submission import JobStatus

import pipeline.job
from infra.__main__ import _found
from pipeline import jobs
from pipeline.config import config_of
from pipeline.errors import ClusterError, ConfigError, StorageError, TrainingError
from pipeline.progress import LOG
from pipeline.run import RunConfig
from pipeline.shards import Manifest
from pipeline.storage import Store
from pipeline.train import Training, staging
from tests.conftest import free_ports, wait_for
from tests.infra.stack import Running

AT_MOST_S = 30


@pytest.fixture
def address(stack: Running, bucket: Store) -> str:
    """Where the stack's Ray takes jobs, with its token in the environment."""
    return _found(stack.folder).ray_jobs


def training(store: Store, manifest: Manifest, run_id: str, **parameters: object) -> jobs.Work[Training]:
    """A training on the small splits."""
    given = {"storage": store.url, "run_id": run_id, "epochs": 5, "global_batch_size": 64, "lr": 0.1, **parameters}
    return jobs.training(store, run_id, config_of(given, RunConfig).model_dump(mode="json"), manifest.folder)


def test_an_address_without_a_cluster_is_one_line(stack: Running, address: str) -> None:
    [nobody] = free_ports(1)
    # SeaweedFS refuses whatever is not signed.
    for port, said in ((nobody, "no Ray dashboard answers"), (_found(stack.folder).s3_port, "refuses the token")):
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"^ray_address='http://127.0.0.1:{port}': {said} [^\n]+$"):
            jobs.connect(f"http://127.0.0.1:{port}")
        assert time.monotonic() - started < AT_MOST_S


def test_a_token_that_is_not_the_clusters_is_one_line(address: str, tmp_path: Path) -> None:
    script = f"from pipeline import jobs; jobs.connect({address!r})"
    (tmp_path / "token").write_text("0" * 64)
    env = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    del env["RAY_AUTH_TOKEN"]
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "ClusterError" in done.stderr.splitlines()[-1]
    assert "refuses the token" in done.stderr.splitlines()[-1]


def test_another_version_of_ray_is_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.59.0")
    with pytest.raises(ClusterError, match=f"the cluster runs Ray {theirs} and this process 2.59.0; install the same"):
        jobs.connect(address)


class _Refuses(BaseHTTPRequestHandler):
    """A head that came back with another token: it says its version, and refuses all else."""

    def do_GET(self) -> None:
        version = self.path == "/api/version"
        self.send_response(200 if version else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": ray.__version__}).encode() if version else b"Unauthorized")


def test_a_head_that_came_back_with_another_token_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "OUTAGE_S", 0.2)
    monkeypatch.setattr(jobs, "POLL_S", 0.1)
    work: jobs.Work[None] = jobs.Work("lenet-r", {}, {}, find=lambda: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ClusterError, match="^the cluster has not answered for 0.2 s [^\n]+ is back$"):
            jobs._wait(jobs.connect(address), work, "lenet-r-1")
        with pytest.raises(ClusterError, match=f"^{address} does not answer: [^\n]+$"):
            jobs.stop(address, work, datetime.now(UTC))
        server.shutdown()


def test_a_job_is_stopped_where_the_store_cannot_ask_it_to_end(address: str) -> None:
    def unreachable(job: str) -> bool:
        raise StorageError("away")

    work: jobs.Work[None] = jobs.Work("lenet-away", {}, {}, find=lambda: None, ask_stop=unreachable)
    client = jobs.connect(address)
    job = client.submit_job(entrypoint="sleep 600", submission_id=f"{work.name}-1")
    assert not jobs.stop(address, work, datetime.now(UTC) - timedelta(minutes=1))  # it is younger
    assert jobs.stop(address, work, datetime.now(UTC))
    wait_for(lambda: client.get_job_status(job) == JobStatus.STOPPED)
    jobs._stop(client, work, "lenet-vanished-1")  # as if the head had forgotten it meanwhile


def test_other_versions_on_the_cluster_are_the_last_line_of_the_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("pipeline.worker"), "propagate", True)  # as it is again afterwards
    here = jobs.versions()
    with pytest.raises(SystemExit):
        pipeline.job.main(json.dumps({"work": "train", "versions": {**here, "python": "3.9"}}))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["error"], said["may_pass"]) == ("ClusterError", True)
    assert said["args"] == [
        f"the cluster has python {here['python']}, not 3.9; install the same versions as where the run begins"
    ]


def test_a_laptop_may_have_another_patch_of_python_and_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = jobs.versions()
    python, version = platform.python_version(), importlib.metadata.version
    monkeypatch.setattr(platform, "python_version", lambda: f"{python}9")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{version(name)}+cpu")
    jobs.require_versions(laptop)
    minor = python.rpartition(".")[0]
    monkeypatch.setattr(platform, "python_version", lambda: f"{minor}9.1")
    with pytest.raises(ClusterError, match=f"^the cluster has python {minor}9, not {minor}; install"):
        jobs.require_versions(laptop)


def test_what_the_job_finds_wrong_is_raised_here(
    bucket: Store, address: str, small_manifest: Callable[[Store], Manifest]
) -> None:
    manifest = small_manifest(bucket)
    with pytest.raises(ConfigError, match="^workers='?50'?: Ray has room for 3 on 3 CPUs"):
        jobs.run_job(address, training(bucket, manifest, "crowded", workers=50))


def test_a_job_whose_process_is_killed_may_be_tried_again(
    stack: Running, bucket: Store, address: str, small_manifest: Callable[[Store], Manifest]
) -> None:
    work = training(bucket, small_manifest(bucket), "killed", workers=1, epochs=1000)
    raised: list[ClusterError] = []

    def train() -> None:
        try:
            jobs.run_job(address, work)
        except ClusterError as error:
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    wait_for(lambda: bucket.exists(f"{staging('killed')}/progress/00001.json"))
    # Not the shell that Ray starts it by.
    [process] = [each for each in stack.processes('"run_id": "killed"') if each.cmdline()[1] == "-m"]
    process.kill()
    thread.join(600)
    [error] = raised
    assert error.may_pass
    assert str(error) == f"job {work.name}-1 has failed: Job entrypoint command failed with exit code 137"


@pytest.mark.parametrize("may_pass", [True, False])
def test_whether_a_failure_may_pass_is_known_here_too(address: str, may_pass: bool) -> None:
    client = jobs.connect(address)
    script = f"from pipeline import errors, job; job._end(errors.StorageError('away', may_pass={may_pass}), 1)"
    job = client.submit_job(entrypoint=f'{sys.executable} -c "{script}"')
    wait_for(lambda: client.get_job_status(job).is_terminal())
    error = jobs._error(client, job, client.get_job_status(job))
    assert isinstance(error, StorageError)
    assert (str(error), error.may_pass) == ("away", may_pass)


@pytest.mark.parametrize("patience", [0, 600], ids=["at once", "killed"])
def test_a_job_that_somebody_stopped_is_not_done_again_however_it_ends(
    address: str, tmp_path: Path, patience: int
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import signal, time\n"
        "from pipeline import errors, job\n"
        "def end(*_):\n"
        f"    time.sleep({patience})\n"
        "    job._end(errors.Terminated(), 143)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    client = jobs.connect(address)
    job = client.submit_job(entrypoint=f"{sys.executable} {script}")
    wait_for(lambda: "ready" in client.get_job_logs(job))
    client.stop_job(job)
    wait_for(lambda: client.get_job_status(job).is_terminal())
    assert ("Terminated" in client.get_job_logs(job)) == (not patience)
    error = jobs._error(client, job, client.get_job_status(job))
    assert isinstance(error, TrainingError)
    assert str(error).startswith(f"job {job} has stopped: ")


def test_a_job_finds_its_own_cluster_of_several_on_the_machine(stack: Running, address: str) -> None:
    client = jobs.connect(address)
    script = "from pipeline.job import own_cluster; print('own cluster', own_cluster())"
    job = client.submit_job(entrypoint=f'RAY_ADDRESS=192.0.2.1:6379 {sys.executable} -c "{script}"')
    wait_for(lambda: client.get_job_status(job).is_terminal())
    [found] = [line for line in client.get_job_logs(job).splitlines() if line.startswith("own cluster")]
    assert found.endswith(f":{_found(stack.folder).ray_port}")


def test_two_who_train_a_run_whose_job_is_being_stopped_follow_one_other_job(
    stack: Running, bucket: Store, address: str, small_manifest: Callable[[Store], Manifest],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    manifest = small_manifest(bucket)
    found: list[Training] = []
    work = training(bucket, manifest, "twice", workers=1)
    client = jobs.connect(address)
    # The second of its name: the first was deleted.
    client.submit_job(entrypoint="sleep 600", submission_id=f"{work.name}-2", metadata=work.metadata)
    wait_for(lambda: client.get_job_status(f"{work.name}-2") == JobStatus.RUNNING)
    threads = [threading.Thread(target=lambda: found.append(jobs.run_job(address, work))) for _ in range(2)]
    caplog.set_level(logging.INFO)
    for thread in threads:
        thread.start()
    wait_for(lambda: caplog.messages.count(f"following job {work.name}-2") == 2)
    client.stop_job(f"{work.name}-2")
    for thread in threads:
        thread.join(600)
    assert len(found) == 2
    assert found[0] == found[1]
    # They have what they asked for before the job has cleared away.
    wait_for(lambda: sorted(stack.jobs("twice")) == ["STOPPED", "SUCCEEDED"])
    # And the code that came with the job has its compiled part.
    said = b"".join(bucket.read(key) for key in bucket.keys(f"{staging('twice')}/{LOG}"))
    assert b"images resident" in said
    assert b"no compiled convolutions" not in said
