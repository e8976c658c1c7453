"""The cost of training with FOGZO on this machine: the measurements of `fogzo bench`."""
