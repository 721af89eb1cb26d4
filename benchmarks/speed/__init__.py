"""How fast training is: `run` has the cases, `flower` and `gpu` two that need more, `figure` draws.

`naive` is what a first implementation does, `timing` what the cases share.
"""
