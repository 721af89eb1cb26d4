"""Data sets: one file each, found by the registry. A file reads or draws images and makes a `Task`.

`fonts` holds the packages of `mixed`.

May import `core`, `data.task`, `data.reading`, `data.drawing` and `data.stratified`.
"""
