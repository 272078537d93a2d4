"""Runs the learning study of attention and long sequences.

python tests/benchmarks/learn.py --help
"""

import sys

from learning.study import main

if __name__ == "__main__":
    main(sys.argv[1:])
