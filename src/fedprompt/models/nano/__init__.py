"""The embedded network: how it is built, its weights, how it was trained, and what it is worth.

May import `core`, `data` and `models`.
"""
