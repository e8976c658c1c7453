"""The commands: fogzo train, eval, compare and bench."""
