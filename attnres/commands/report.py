"""Draw the report of one probe, or one over several."""

import sys

from attnres.report.report import main

if __name__ == "__main__":
    sys.exit(main())
