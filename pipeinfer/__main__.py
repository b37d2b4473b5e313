"""``python -m pipeinfer``."""

from pipeinfer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
