"""Judge what a probe measured, without its models."""

import sys

from attnres.statistics.rejudge import main

if __name__ == "__main__":
    sys.exit(main())
