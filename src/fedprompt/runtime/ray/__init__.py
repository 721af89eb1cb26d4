"""`ray`: a driver actor runs the rounds, client actors train.

Everything that touches Ray is here, and every private part of it in `private`. Ray itself is
imported when it is used.
"""

from fedprompt.runtime.ray import pool  # registers the runtime

__all__ = ["pool"]
