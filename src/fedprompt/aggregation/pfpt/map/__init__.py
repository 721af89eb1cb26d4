"""The well-posed variant of PFPT, in the order of the paper's Section 3.

| paper    | code                  | shape        | meaning                                      |
|----------|-----------------------|--------------|----------------------------------------------|
| phi_i    | `Aggregation.prompts` | (n, d)       | summarizing prompts; n changes every round   |
| omega_tk | `cohort.prompts`      | (N, d)       | local prompts of all clients, stacked        |
| z_tk^i   | `columns.assignment`  | (N,)         | summarizing prompt of each local prompt      |
| alpha    | `Block.noise`         | scalar       | variance of local around summarizing prompts |
| sigma(g) | `Inclusion`           | (L,)         | probability that a client uses a column      |
| m        | `num_clients`         | scalar       | clients of the round                         |
| -        | `Block.base`          | scalar       | base measure phi ~ N(mu0, base I)            |
| -        | `Block.strength`      | (n,)         | clients that a remembered prompt counts for  |
| kappa_i  | `Aggregation.keys`    | (n, q)       | keys, a second block with variance tau^2     |

| file                          | what lives there                                               |
|-------------------------------|----------------------------------------------------------------|
| `inference`                   | the round as a table of contents                               |
| `scales`                      | units and first guesses of variances, read off the data        |
| `key_noise`, `partitions`     | groups among keys, and the spread within them                  |
| `model`, `blocks`, `inclusion`| Section 3.1: the generative model                              |
| `columns`, `matching`, `search`| Section 3.2, Algorithm 2: the matching                        |
| `labels`, `summary`           | Section 3.3, Algorithm 1: which prompt goes on, and the result |
| `memory`                      | what earlier rounds left                                       |

Nothing here imports the other variants.
"""
