"""One run: its config, network, data order, loop, checkpoints and folder."""
