"""Draws pipeline/data/augmentations.png: a frame under each augmentation of the preset `strong`.

evspan simulate raw --recordings train=1 --seconds 2 --seed 3 --noise-hz 0.02
evspan prep source=raw output=shards dataset=simulated frames.downsample=4
.venv/bin/python tests/benchmarks/augmentation_sheet.py shards pipeline/data/augmentations.png
"""

import argparse
from pathlib import Path

from evspan.conf.compose import compose
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import TrainConfig
from evspan.data_prep.draw import write_strip
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.tensorboard.augmentation_images import example_tiles
from PIL import Image

COLUMNS = 3
COLOURS = 16  # of the PNG


def write_sheet(shards: Path, output: Path) -> None:
    """Writes the sheet of a labelled frame of the split train."""
    config = compose(TrainConfig, ["augmentation=strong"]).training.augmentation
    tiles = example_tiles(open_dataset(DatasetConfig(root=str(shards)), "train"), config)
    write_strip(output, tiles, COLUMNS)
    sheet = Image.open(output).quantize(COLOURS, dither=Image.Dither.NONE)
    sheet.save(output, "PNG", optimize=True)


def main() -> None:
    """Writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    write_sheet(args.shards, args.output)


if __name__ == "__main__":
    main()
