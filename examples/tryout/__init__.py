"""The first minutes with the project: `make try`."""
