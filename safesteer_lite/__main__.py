"""`python -m safesteer_lite` is `safesteer-lite`."""

import sys

if __name__ == "__main__":
    # Python puts the current folder first on the path for `-m`. This package has been found by now, and nothing else may
    # come from a folder in which somebody happens to work.
    if not sys.flags.safe_path:
        del sys.path[0]
    from safesteer_lite.shell.cli import main

    sys.exit(main())
