"""Recordings in, shards of frames out."""

from evspan.data_prep.numba_cache import provide_numba_cache

provide_numba_cache()
