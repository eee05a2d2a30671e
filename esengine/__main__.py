"""`python -m esengine` is the console script, for torchrun and friends."""

import sys

from esengine.cli import main

sys.exit(main())
