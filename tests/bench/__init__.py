"""The measurements of `make bench`. Each measurement runs the programs or settings that it compares in turns or in the
same run, and prints ratios. No measurement asserts a speed."""
