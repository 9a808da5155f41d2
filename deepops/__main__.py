"""``python -m deepops``: the same as the ``deepops`` command."""

import sys

from deepops.cli import main

if __name__ == "__main__":
    sys.exit(main())
