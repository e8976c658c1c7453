"""Many runs: rows tuned alike, their statistics, tables and report."""
