"""Texts of variable length in HDF5 files: read by a process of its own, whose failures are told apart."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from evspan.conf.errors import RecordingError
from evspan.data_prep import hdf5_texts
from evspan.data_prep.hdf5_files import UnavailableFileError, UnsafeDatasetError
from evspan.data_prep.recordings.open import open_recording

EVENTS = np.dtype([("x", "<u2"), ("y", "<u2"), ("p", "<i2"), ("t", "<i8")])


@pytest.fixture
def metavision(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["CD/events"] = np.zeros(4, EVENTS)
        file.attrs["geometry"] = "320x240"  # h5py stores it with variable length
    return path


def read_geometry(path: Path) -> str:
    with h5py.File(path) as file:
        return hdf5_texts.read_text(file["/"], "geometry", ["geometry"])


def test_a_text_of_variable_length_is_read(metavision):
    recording = open_recording(metavision)
    assert (recording.height, recording.width) == (240, 320)


@pytest.mark.slow
def test_a_heap_of_zeros_is_damage(metavision):
    data = bytearray(metavision.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 16 : heap + 512] = bytes(496)  # HDF5 then does not return
    metavision.write_bytes(data)
    with pytest.raises(RecordingError, match="geometry of / is no text, or is damaged"):
        open_recording(metavision)


FAILURES = {
    "raise ImportError('libhdf5.so')": "ImportError: libhdf5.so",
    "import os; print('reading', flush=True); os.kill(os.getpid(), 9)": "ended with -9",
    "import os; os.abort()": "ended with -6",
    "raise OSError(5, 'Input/output error')": "Input/output error",
}


@pytest.mark.parametrize("code", FAILURES)
def test_other_failures_of_the_process_are_no_damage(metavision, monkeypatch, code):
    reader = metavision.with_name("reader.py")
    reader.write_text(code)
    monkeypatch.setattr(hdf5_texts, "READER", reader)
    with pytest.raises(UnavailableFileError, match=FAILURES[code]):
        read_geometry(metavision)


def test_a_process_that_cannot_start_is_no_damage(metavision, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnavailableFileError, match="a.hdf5 cannot be read now"):
        read_geometry(metavision)


def test_a_crash_of_the_library_is_damage(metavision, monkeypatch):
    reader = metavision.with_name("reader.py")
    reader.write_text("import os; print('reading', flush=True); os.abort()")
    monkeypatch.setattr(hdf5_texts, "READER", reader)
    with pytest.raises(UnsafeDatasetError, match="damaged"):
        read_geometry(metavision)
