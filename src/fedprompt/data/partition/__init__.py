"""Who holds what: partitions of the training split among clients, found by the registry.

`create(name, **options)(labels, num_clients, seed)` gives one index array for each client. May
import `core` and `data.task`.
"""

from fedprompt.data.partition.base import Partitioner, create, partitioners

__all__ = ["Partitioner", "create", "partitioners"]
