"""`python -m flows.engine`: what a worker of the pool that infra/deploy.py makes starts for a flow run.

It is Prefect's own engine. A worker left to itself imports Prefect once more before it, and the engine looks for
garbage among imports: 1.7 s.
"""

import runpy

from pipeline.imports import for_good


def main() -> None:
    """Run the flow run that the environment names."""
    with for_good():
        import prefect.flow_engine  # noqa: F401

        import pipeline.run  # noqa: F401
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
