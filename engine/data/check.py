"""The former name of ``python -m engine.check``."""

import sys

if __name__ == "__main__":
    print("error: python -m engine.data.check is now python -m engine.check", file=sys.stderr)
    sys.exit(2)
