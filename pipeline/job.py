"""What runs on the head of a Ray cluster as a job: `python -m pipeline.job REQUEST`, submitted by pipeline/jobs.py.

The request is JSON: which work, to train or to predict; its parameters; the job's name; for a training, the folder of
its dataset in the store; and the versions of where it was begun, which have to be those of this machine. What a failure
says is the last line of the output, as JSON.
"""

import json
import logging
import os
import sys

import psutil

from pipeline.imports import for_good

with for_good():
    from pipeline.batch import PredictConfig, predict_batch
    from pipeline.config import config_of
    from pipeline.errors import PipelineError, Terminated
    from pipeline.jobs import require_versions
    from pipeline.run import RunConfig
    from pipeline.shards import require_manifest
    from pipeline.storage import open_store
    from pipeline.train import fit


def main(argument: str) -> None:
    """Do the work; exit code 0 when what it leaves is in the store."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    logging.getLogger("pipeline.worker").propagate = False  # whoever follows the run hears the workers, too
    try:
        asked = json.loads(argument)
        require_versions(asked["versions"])
        parameters = asked["parameters"] | {"ray_address": own_cluster()}
        if asked["work"] == "predict":
            predict_batch(config_of(parameters, PredictConfig))
        else:
            config = config_of(parameters, RunConfig)
            store = open_store(config.storage)
            manifest = require_manifest(store, asked["dataset"])
            fit(store, str(config.run_id), manifest, config, config, config, job=asked["job"])
    except PipelineError as error:
        _end(error, error.exit_code)
    except Terminated as error:
        _end(error, 143)


def own_cluster() -> str:
    """host:port of the cluster that this is a job of.

    RAY_ADDRESS is set for jobs, but to what Ray finds for "auto": on a machine with several clusters, to any of them.
    """
    for parent in psutil.Process().parents():
        for word in parent.cmdline():
            if word.startswith("--gcs-address="):  # it is the node's raylet
                return str(word.partition("=")[2])
    return os.environ["RAY_ADDRESS"]


def _end(error: PipelineError | Terminated, code: int) -> None:
    said: dict[str, object] = {"error": type(error).__name__, "args": [str(arg) for arg in error.args]}
    if isinstance(error, PipelineError):
        said["may_pass"] = error.may_pass
    print(json.dumps(said), flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
