"""The server's half of a round: sampling, checking, merging, evaluating."""
