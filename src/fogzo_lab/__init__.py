"""The laboratory of fogzo: data, networks and recipes, training, comparison, benchmarks, commands.

It needs the extra ``pip install 'fogzo[lab]'``. `fogzo` itself needs torch alone, and nothing here.
"""
