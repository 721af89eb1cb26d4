"""PFPT: probabilistic matching of prompt sets, in three variants.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752. docs/pfpt.md compares the variants.

* `map`: well posed, and the default. It puts back the base measure that a Beta-Bernoulli process
  has, because without a price for a new summarizing prompt nothing merges (Yurochkin et al., ICML
  2019 and NeurIPS 2019 have it). It matches prompts together with their keys and with what earlier
  rounds left.
* `paper`: the paper's equations, Algorithms 1 and 2, taken at their word.
* `released`: the authors' program, taken at its word.

`aggregator` and `options` choose between them. `paper` and `released` share `candidates` and `nets`
and know nothing of `map`, which knows nothing of them. Importing this package registers `pfpt`.
"""

from fedprompt.aggregation.pfpt.aggregator import Pfpt
from fedprompt.aggregation.pfpt.options import PfptOptions

__all__ = ["Pfpt", "PfptOptions"]
