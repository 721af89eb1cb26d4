"""A run: its federation, its driver, and the directory that it leaves behind.

May import everything but `report`, `sweep` and `cli`.
"""
