"""The measurements of `make bench`. Each measurement compares programs, or settings of one program. It runs them
alternately or one after the other in one call, because other work on the machine changes absolute times, and it prints
ratios. No measurement fails because of a speed."""
