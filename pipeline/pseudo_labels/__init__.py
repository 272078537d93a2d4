"""Pseudo-labels of a trained detector, after LEOD (Wu et al., CVPR 2024)."""
