"""The former name of ``python -m engine.check --views FILE``."""

import sys

if __name__ == "__main__":
    print("error: python -m engine.data.show is now python -m engine.check --views FILE", file=sys.stderr)
    sys.exit(2)
