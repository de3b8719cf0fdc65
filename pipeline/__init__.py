"""The work of the pipeline: storage, data, Ray training, evaluation, publishing. Knows nothing of Prefect."""
