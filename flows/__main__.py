"""`lenet`: the command line, made to start quickly.

Prefect's server, which takes 4 s, starts beside the imports.
"""

import sys

from pipeline.imports import for_good
from pipeline.signals import undisturbed


def main() -> None:
    """Entry point."""
    try:
        with for_good(), undisturbed():
            if sys.argv[1:2] == ["train"] and not {"--help", "-h"} & set(sys.argv):
                from flows import server

                server.begin()
            from flows.cli import main as run
    except KeyboardInterrupt:
        print("lenet: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
