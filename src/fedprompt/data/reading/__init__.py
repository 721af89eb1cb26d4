"""Readers of files that others wrote: archives, images, lists, pickles that are never unpickled.

They trust nothing and say in one line what is wrong. May import `core` and `data.task`.
"""
