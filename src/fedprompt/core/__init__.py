"""What every room may use: types that travel, errors, checks, the registry, seeds, files.

Imports nothing else of the package.
"""
