"""Counts detections on recordings without boxes: `learning.real_events` as a program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from learning.real_events import main

if __name__ == "__main__":
    main(*sys.argv[1:])
