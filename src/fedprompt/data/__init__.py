"""Data: tasks, partitions, and the frozen prefix that is computed once."""

from fedprompt.data import partition
from fedprompt.data.task import Split, Task, datasets

__all__ = ["Split", "Task", "datasets", "partition"]
