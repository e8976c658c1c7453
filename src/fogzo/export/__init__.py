"""Files for the programs that serve low-bit networks, holding exactly what was trained."""
