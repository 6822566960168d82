"""Measurements, side by side in one run, as ratios: `make bench`. Nothing here asserts a speed."""
