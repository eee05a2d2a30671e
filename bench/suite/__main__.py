"""`python bench/suite`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this folder

from suite.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
