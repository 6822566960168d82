"""The measurements of `make bench`. Each measurement compares two programs in the same run and prints ratios. No
measurement asserts a speed."""
