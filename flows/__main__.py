"""`lenet`: the command line, made to start quickly.

Prefect's server, which takes 4 s, starts beside the imports.
"""

import os
import sys

from flows.server import begin, past_proxies
from pipeline.errors import PipelineError
from pipeline.imports import for_good
from pipeline.signals import undisturbed


def main() -> None:
    """Entry point."""
    os.environ.update(past_proxies(os.environ))
    try:
        with for_good(), undisturbed():
            if sys.argv[1:2] == ["train"] and not {"--help", "-h"} & set(sys.argv):
                begin()
            from flows.cli import main as run
    except KeyboardInterrupt:
        print("lenet: interrupted", file=sys.stderr)
        sys.exit(130)
    except PipelineError as error:
        print(f"lenet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    run()


if __name__ == "__main__":
    main()
