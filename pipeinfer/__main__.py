"""``python -m pipeinfer``."""

import os
import sys

# `-m` looks for modules where it is started: a random.py or launch.py there is the user's, and not what we mean.
root = os.path.realpath(os.path.dirname(os.path.dirname(__file__)))
if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != root:
    del sys.path[0]

from pipeinfer.cli import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
