"""The methods benchmark: which methods win where.

`grid` says what is run, `runner` runs what is missing, `results` keeps it, `summary` is its
statistics, `tables` and `figures` make the pages. `bounds` and `domains` ask what could be reached.
"""
