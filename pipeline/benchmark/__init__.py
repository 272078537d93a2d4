"""Measures training, loading and inference of a config on this machine."""
