"""The commands: fogzo train and fogzo compare."""
