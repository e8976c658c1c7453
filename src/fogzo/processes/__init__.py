"""Signals, and worker processes that die with this one. Needs the standard library alone.

Nothing here imports torch, which takes seconds: a command must answer Ctrl-C before it, and a
worker must notice that its parent has died.
"""
