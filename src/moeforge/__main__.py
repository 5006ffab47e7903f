"""`python -m moeforge ...` and `torchrun -m moeforge train ...`."""

import sys

from moeforge.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
