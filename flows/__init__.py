"""Orchestration: the Prefect flows and the command line. Each task is one call into `pipeline`."""
