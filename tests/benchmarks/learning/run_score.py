"""Scores a checkpoint: `learning.scores` as a program, with tests/benchmarks on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from learning.scores import main

if __name__ == "__main__":
    main(sys.argv[1:])
