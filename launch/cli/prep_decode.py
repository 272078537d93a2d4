"""`evspan prep decode`: any recording to HDF5 with events/{t,x,y,p}."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.data_prep.recordings.h5 import Compression, H5Writer
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.shards.atomic import atomic_write
from evspan.launch.cli.command import Parser
from evspan.launch.cli.existing_files import add_overwrite_option, require_new
from evspan.launch.cli.prep_info import dropped_summary
from evspan.launch.output_streams import drop_lost_output


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    recording: Path
    out: Path
    compression: Compression
    overwrite: bool


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        "evspan prep decode",
        description="Any recording to HDF5 with events/{t,x,y,p} and height, width.",
        epilog="example: evspan prep decode drive_td.dat drive_td.h5",
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("out", type=Path, help="a file ending in .h5")
    parser.add_argument(
        "--compression",
        choices=[option.name for option in Compression],
        default=Compression.gzip.name,
        help="gzip: every HDF5 library reads it (default); lz4: faster to read and write, and "
        "larger; its readers need hdf5plugin",
    )
    add_overwrite_option(parser)
    args = parser.parse_args(argv)
    return Options(args.recording, args.out, Compression[args.compression], args.overwrite)


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = _parse(argv)
    if options.out.suffix != ".h5":
        raise UserError(
            f"{options.out} does not end in .h5; decode writes HDF5: evspan prep decode "
            f"{options.recording} {options.recording.with_suffix('.h5')}"
        )
    drop_lost_output()
    recording = open_recording(options.recording)
    if options.out.exists() and options.out.samefile(options.recording):
        raise UserError(f"{options.out} is the recording itself; name another file")
    require_new([options.out], overwrite=options.overwrite)
    with (
        atomic_write(options.out) as temporary,
        H5Writer(
            temporary, recording.height, recording.width, compression=options.compression
        ) as writer,
    ):
        for events in recording.chunks():
            writer.write(events)
    print(f"{options.out}: {recording.events} events{dropped_summary(recording.dropped)}")
    for text in recording.warnings().values():
        print(f"warning: {text}")
