"""`python -m calibquant` is the calibquant command; so is `torchrun -m calibquant`."""

from __future__ import annotations

import sys

from calibquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
