"""The machine: devices, processes, signals, files.

Of these `signals` and `workers` need the standard library alone: a command must answer Ctrl-C, and
a worker must notice that its parent has died, before torch is imported, which takes seconds.
"""
