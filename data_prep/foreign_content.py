"""Recognises what a file contains that cannot be read under its suffix, by its first bytes."""

from pathlib import Path

FIRST_BYTES = 4096
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
NUMPY_SIGNATURE = b"\x93NUMPY"
COMMENT = b"% "  # in text
TO_NPZ = "Boxes belong to a recording; events are read of .npz with the arrays t, x, y, p"
TO_H5 = "Convert it to .h5 with events/t, x, y, p"
# First bytes, what the file is then, and what to do.
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "Run: git lfs pull"),
    (b"\x1f\x8b", "is compressed with gzip", "Decompress it: gunzip (a .tar.gz: tar xf)"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard", "Decompress it: unzstd"),
    (b"\xfd7zXZ\x00", "is compressed with xz", "Decompress it: unxz"),
    (b"BZh", "is compressed with bzip2", "Decompress it: bunzip2"),
    (b"\x04\x22\x4d\x18", "is compressed with LZ4", "Decompress it: unlz4"),
    (b"PK\x03\x04", "is a ZIP archive", "Unpack it: unzip"),
    (b"PK\x05\x06", "is an empty ZIP archive", "Download it again"),
    (b"Rar!", "is a RAR archive", "Unpack it: unrar x"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive", "Unpack it: 7z x"),
    (HDF5_SIGNATURE, "is an HDF5 file", "Give it the suffix .h5"),
    (NUMPY_SIGNATURE, "is a NumPy array", "Give it the suffix .npy; of recordings, .npz is read"),
    (b"#!AER-DAT4", "is an AEDAT 4 recording of DV", "Give it the suffix .aedat4"),
    (b"#!AER-DAT", "is an AEDAT recording of jAER", TO_H5),
    (b"#ROSBAG", "is a ROS bag", TO_H5),
    (COMMENT, "has the header of a Prophesee recording", "Give it the suffix .raw or .dat"),
)
NO_DATA = b"\0" * 64


def describe_foreign_content(path: Path, *, expected: bytes = b"", is_text: bool = False) -> str:
    """What a file that cannot be read contains, and the remedy; empty where that is not recognised.

    Args:
        expected: first bytes that are right for the file's suffix, so that nothing is said of them.
        is_text: text is right for it.

    Returns:
        Two sentences that continue the file's name: "is a Git LFS pointer, ... Run: git lfs pull".

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(FIRST_BYTES)
    if not data:
        return "is empty (0 bytes). Its download or copy was interrupted: copy it again"
    if expected and data.startswith(expected):
        return ""
    for signature, description, remedy in SIGNATURES:
        is_comment = is_text and signature == COMMENT
        if signature == NUMPY_SIGNATURE and path.suffix.lower() == ".npy":
            remedy = TO_NPZ
        if data.startswith(signature) and not is_comment:
            return f"{description}. {remedy}"
    if data.startswith(NO_DATA) and not data.strip(b"\0"):
        return (
            "begins with zeros only. Its blocks were never written, as after a full disk: copy it "
            "again"
        )
    return _described_text(data, is_text)


def _described_text(data: bytes, is_text: bool) -> str:
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page, not a recording or box file. The address was that of a page, or the "
            "download needs a login: download it again"
        )
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in data)
    if printable < len(data) or is_text:
        return ""
    line = data.splitlines()[0].decode("ascii")[:40] if data.splitlines() else ""
    return f"is a text file that begins with {line!r}. {TO_H5}"
