"""Token shards from text that is too large to tokenize at every start."""

import sys

from attnres.data.corpus.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
