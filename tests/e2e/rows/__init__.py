"""The verdict table of the operator, row by row, with real pods: each row is a job whose scripted trainer or whose
surroundings fail in one way, and what must show in its status and events, within which time."""
