"""The measurements of `make bench`. Most of them compare this project with another program, or compare two settings of
this project, and print ratios. The two sides of a comparison run within one call, one after the other or several times
alternately, because other work on the machine changes absolute times. A slow result does not make a measurement
fail."""
