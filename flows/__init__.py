"""Orchestration: the Prefect flow and the command line. Each task is one call into `pipeline`."""
