"""`python -m safesteer_lite` is `safesteer-lite`."""

import sys

from safesteer_lite.shell.cli import main

if __name__ == "__main__":
    sys.exit(main())
