"""`python -m fleet.cli`: the same as the console script `expertmesh`."""

import sys

from fleet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
