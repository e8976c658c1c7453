"""The commands of `fogzo`, and what they print."""
