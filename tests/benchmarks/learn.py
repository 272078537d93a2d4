"""Runs the learning study: attention, long sequences, generalisation, frame rates.

python tests/benchmarks/learn.py --help
"""

import sys

from learning.study import main

if __name__ == "__main__":
    main(sys.argv[1:])
