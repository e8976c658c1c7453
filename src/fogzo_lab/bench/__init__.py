"""What training with FOGZO costs on this machine: the measurements behind `fogzo bench`."""
