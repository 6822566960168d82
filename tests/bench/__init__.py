"""The measurements of `make bench`. Most of them compare this project with another program, or with another setting of
itself, and print ratios. What is compared runs within one call, one after the other or in turns, because other work on
the machine changes absolute times. No measurement fails because something is slow."""
