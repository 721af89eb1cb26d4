"""The frozen prefix of the network, computed once for each image and kept on disk.

May import `core` and `data.task`; it knows the network by a protocol alone.
"""
