"""L2P's vote for the prompts of a batch, with the ties of PFPT's released code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.devices import send


def majority_vote(similarity: Tensor, count: int) -> Tensor:
    """Rows with the most votes when every image votes for its `count` most similar prompts, in
    ascending order (Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022).

    Ties are frequent, and training depends on them. The released code lists the prompts that got a
    vote, fills the list up to the size of the pool with zero votes and takes `topk`, which breaks
    ties in an order of its own that depends on the list's length; so does this.

    Args:
        similarity: (B, n) cosine similarities.
        count: rows to take, and votes of each image; all n rows if there are fewer.

    >>> majority_vote(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.9], [0.8, 0.0, 0.1]]), 1)
    tensor([0])
    """
    size = similarity.shape[1]
    count = min(count, size)
    # On the CPU, so that ties fall the same way on every device; a GPU is waited for.
    votes = similarity.topk(count, dim=1).indices.cpu().flatten()
    voted, tally = torch.unique(votes, return_counts=True)
    others = torch.arange(size)[~torch.isin(torch.arange(size), voted)]
    order = torch.cat([voted, others])
    winners = F.pad(tally, (0, len(others))).topk(count).indices
    return send(order[winners].sort().values, similarity.device)
