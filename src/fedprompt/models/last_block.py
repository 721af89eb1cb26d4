"""The last block of a Vision Transformer, for the tokens whose outputs are read."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def block_for_prefix(block: Any, tokens: Tensor, prefix: int) -> Tensor:
    """`block(tokens)[:, :prefix]`, without what only the other tokens' outputs need: their queries,
    their projection and their perceptron, 10 of the 12 d^2 products of each.

    Args:
        block: timm's `Block` in evaluation mode.
        tokens: (B, T, d).
        prefix: how many tokens to compute.
    """
    attention = block.attn
    width, heads = attention.attn_dim, attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    own, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    normed = block.norm1(tokens)
    size, length, _ = tokens.shape
    # As a matrix: a batch of slices would be multiplied one by one.
    query = F.linear(normed[:, :prefix].reshape(size * prefix, -1), weight[:width], own)
    query = query.reshape(size, prefix, heads, -1).transpose(1, 2)
    both = F.linear(normed, weight[width:], rest).reshape(size, length, 2, heads, -1)
    key, value = both.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    tokens = tokens[:, :prefix] + block.ls1(attention.proj(attention.norm(mixed)))
    result: Tensor = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return result
