"""``python -m lfp_kernels info | backends | train | demo``."""

import sys

from lfp_kernels.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
