"""The training itself: ranks, model, engine, loop, evaluation, checkpoints, export."""
