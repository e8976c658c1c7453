"""The commands: fogzo train, eval, compare, doctor, export and bench."""
