"""`lenet`: the command line, made to start quickly.

What imports make is there to stay: to look through it for garbage takes 0.6 s of 3.8 while it is made, and once more,
at the end, 1.4 s. And Prefect's server, which takes 3 s, starts beside the imports.
"""

import atexit
import gc
import sys


def main() -> None:
    """Entry point."""
    gc.disable()
    atexit.register(gc.freeze)
    try:
        if sys.argv[1:2] == ["train"] and not {"--help", "-h"} & set(sys.argv):
            from flows import server

            server.begin()
        from flows.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
