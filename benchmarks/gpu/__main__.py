"""The command ``python -m benchmarks.gpu``."""

import sys

from benchmarks.gpu.kernels import main

if __name__ == "__main__":
    sys.exit(main())
