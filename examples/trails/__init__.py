"""The demo's data set: sentences about hiking trails, each with its functional representation."""
