"""Which prompts an image gets: selection from the pool of summarizing prompts (docs/pfpt.md).

Every rule returns row numbers of the pool in ascending order, one set for a whole batch.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.checks import check_choice, check_integer, check_number, is_flag
from fedprompt.core.errors import ConfigError
from fedprompt.models.voting import majority_vote

SELECTIONS = ("keyed", "l2p", "all")
QUERIES = ("style", "cls")
"""The queries that a backbone computes."""
QUERY_CHOICES = (*QUERIES, "both")
WHITENINGS = ("auto", "public", "clients")
RULES = ("hard", "soft")
PLACEMENTS = ("input", "pool", "shallow", "deep", "none")
MODES = ("shared", "personal")
CHOICES = ("client", "batch")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How many prompts there are, how they are chosen and how they are trained."""

    count: int = 5
    """Tokens prepended to an image (top-k of the selection); 0 trains the head alone."""
    pool: int | None = None
    """Prompts that the server starts with; null means `count`."""
    placement: str = "input"
    """How prompts enter. `input`: after CLS, once; `pool` and `shallow` are the same and say that
    prompts are selected from a pool (L2P) or all used (VPT-shallow). `deep`: a prompt has a part
    for every block from `depth` on and takes the place of its own output there (VPT-deep).
    `none`: there are none."""
    depth: int = 0
    """The block before which prompts enter, from 0. What lies below is frozen, cached and never
    computed again; tuning of the backbone reaches the blocks from here on, too. All methods of a
    run have the same; methods without prompts and tuning ignore it."""
    mode: str = "shared"
    """`shared`: the server merges them; `personal`: every client keeps its own."""
    selection: str = "keyed"
    """`keyed`: nearest keys to the batch's mean query, to tell domains apart; `l2p`: majority vote
    of the cosines between the prompts themselves and the images' CLS features; `all`. What `auto`
    of a config means is decided by `config.automatic_selection`."""
    query: str = "style"
    """What keyed selection compares: `style` (statistics of the tokens), `cls` (CLS feature) or
    `both`, one after the other."""
    whiten: bool | str = "auto"
    """Whether keyed selection compares queries in units of how far images of one domain differ, so
    that a single image says its domain. `public` (or true): by the spread within domains of the
    data set's public images; a data set without them is refused. `clients`: by the spread within
    clients, which each of them tells once. `auto`: `clients` if the data have several domains, else
    false (`config.automatic_whitening`). Other rules of selection ignore it."""
    choose_by: str = "client"
    """Keyed selection in training: once, by the mean query of the client's data, or anew for every
    `batch`, which suits clients whose data mix domains."""
    similarity_weight: float = 0.01
    """Lambda of the `l2p` similarity term of the loss (released: +0.01; L2P's sign is negative)."""
    eval_batch: int = 16
    """Test images of one domain that share a selection in evaluation; 1 selects for each alone."""
    choice: str = "hard"
    """Keyed selection in evaluation. `hard`: the nearest prompts; `soft`: the predictions by every
    key's own prompts, mixed by how probable each key is. `soft` needs `whiten=clients`."""
    init_std: float = 0.02
    """Standard deviation of the initial prompts."""
    lr: float = 1e-2
    """Adam's learning rate for the prompts."""

    def __post_init__(self) -> None:
        for field, names in (
            ("selection", SELECTIONS),
            ("query", QUERY_CHOICES),
            ("choice", RULES),
            ("placement", PLACEMENTS),
            ("mode", MODES),
            ("choose_by", CHOICES),
        ):
            check_choice(f"prompts.{field}", getattr(self, field), names)
        check_integer("prompts.count", self.count, 0)
        check_integer("prompts.depth", self.depth, 0)
        if self.pool is not None and self.pool < self.count:
            raise ConfigError(
                f"prompts.count: {self.count} prompts cannot be selected from a pool of "
                f"{self.pool}; expected prompts.count <= prompts.pool; "
                f"set prompts.pool={self.count} or lower prompts.count"
            )
        if self.selection == "all" and self.pool_size != self.count:
            raise ConfigError(
                f"prompts.pool: selection=all prepends the whole pool, so expected {self.count} "
                f"(prompts.count), got {self.pool}; leave prompts.pool out"
            )
        self._check_placement()
        if self.mode == "personal" and self.selection != "all":
            raise ConfigError(
                f"prompts.mode=personal: a client uses all prompts that it keeps, so expected "
                f"prompts.selection=all, got '{self.selection}'"
            )
        self._check_whitening()
        check_integer("prompts.eval_batch", self.eval_batch, 1)
        for field in ("init_std", "lr"):
            check_number(f"prompts.{field}", getattr(self, field), 0)
        if not math.isfinite(self.similarity_weight):
            raise ConfigError(
                f"prompts.similarity_weight: expected a finite number, got {self.similarity_weight}"
            )

    def _check_whitening(self) -> None:
        """Refuse a whitening that does not exist, and a soft choice without one."""
        if not is_flag(self.whiten) and self.whiten not in WHITENINGS:
            raise ConfigError(
                f"prompts.whiten: expected true or false, or one of {', '.join(WHITENINGS)}, "
                f"got {self.whiten!r}"
            )
        if self.choice == "soft" and self.sends_keys and not self.tells_spread:
            raise ConfigError(
                f"prompts.choice=soft: expected prompts.whiten=clients, by which keys have "
                f"probabilities, got {str(self.whiten).lower()}; set it, or prompts.choice=hard"
            )

    def _check_placement(self) -> None:
        """Refuse a placement that says something else than the other options."""
        if self.placement == "none" and self.count:
            raise ConfigError(
                f"prompts.placement=none: expected prompts.count=0, got {self.count}; "
                "set prompts.count=0"
            )
        selects = self.selection != "all"
        if self.placement in ("pool", "shallow") and selects != (self.placement == "pool"):
            expected = "keyed or l2p" if self.placement == "pool" else "all"
            raise ConfigError(
                f"prompts.placement={self.placement}: expected prompts.selection={expected}, "
                f"got '{self.selection}'; set it, or use prompts.placement=input for both"
            )

    @property
    def query_kind(self) -> str:
        """By which queries prompts are selected: `l2p` knows the CLS feature alone."""
        if self.selection == "l2p":
            return "cls"
        return f"whitened {self.query}" if self.selects_by_whitened else self.query

    @property
    def selects_by_whitened(self) -> bool:
        """Whether the queries of `query_kind` are whitened ones."""
        return self.whiten in (True, "public") and self.sends_keys

    @property
    def tells_spread(self) -> bool:
        """Whether clients tell how their queries spread, and receive discriminants for keys."""
        return self.whiten == "clients" and self.sends_keys

    @property
    def sends_keys(self) -> bool:
        """Whether prompts travel with their keys."""
        return self.selection == "keyed" and self.count > 0

    @property
    def selects_together(self) -> bool:
        """Whether the prompts of a test image depend on the images beside it."""
        return self.count > 0 and self.selection != "all" and self.eval_batch > 1

    def width(self, embed_dim: int, blocks: int) -> int:
        """Length of one prompt's row: d, or with `deep` a part of d for each of the blocks that
        prompts pass.
        """
        return embed_dim * blocks if self.placement == "deep" else embed_dim

    @property
    def pool_size(self) -> int:
        """Prompts that the server starts with."""
        return self.count if self.pool is None else self.pool


def nearest_keys(query: Tensor, keys: Tensor, count: int) -> Tensor:
    """Rows of the `count` keys nearest to a query (Euclidean), ascending; equal distances go to the
    lower row.

    Args:
        query: (q,) mean query of a batch.
        keys: (n, q), n >= count.
        count: rows to take; all rows if there are fewer.

    >>> keys = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.9, 0.0]])
    >>> nearest_keys(torch.tensor([1.0, 0.0]), keys, 2)
    tensor([1, 2])
    """
    distances = (keys - query).square().sum(dim=1)
    return torch.sort(distances, stable=True).indices[:count].sort().values


def likeliest_rows(query: Tensor, discriminants: Tensor, count: int) -> Tensor:
    """Rows of the `count` largest linear discriminants, ascending; of equals the lower row.

    Args:
        query: (q,) mean query of a batch.
        discriminants: (n, q + 1) of the prompts' keys, see `data.prefix.spread.discriminants`.
        count: rows to take; all rows if there are fewer.

    >>> likeliest_rows(torch.tensor([2.0]), torch.tensor([[1.0, 0.0], [3.0, -5.0], [0.0, 3.0]]), 2)
    tensor([0, 2])
    """
    scores = scores_of(query, discriminants)
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def scores_of(query: Tensor, discriminants: Tensor) -> Tensor:
    """(n,) log probability of each key for one image with this query (q,), up to a common term."""
    # Row by row, so that equal discriminants have equal scores.
    return (discriminants[:, :-1] * query).sum(dim=1) + discriminants[:, -1]


def key_scores(options: PromptOptions, query: Tensor, keys: Tensor) -> Tensor:
    """(n,) how well each key fits a query: `rows_of_query` takes the prompts of the largest.

    Args:
        options: the rule.
        query: (q,)
        keys: (n, q) addresses, or (n, q + 1) discriminants, as they were broadcast.
    """
    if options.tells_spread:
        return scores_of(query, keys)
    return -(keys - query).square().sum(dim=1)


def rows_of_query(options: PromptOptions, query: Tensor, keys: Tensor) -> Tensor:
    """The prompts (k,) of keyed selection.

    Args:
        options: the rule.
        query: (q,) mean query of a batch, or of a client's data.
        keys: (n, q) addresses, or (n, q + 1) discriminants, as they were broadcast.
    """
    choose = likeliest_rows if options.tells_spread else nearest_keys
    return choose(query, keys, options.count)


def select_rows(
    options: PromptOptions,
    queries: Tensor,
    prompts: Tensor,
    keys: Tensor,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The prompts of one batch.

    Args:
        options: the rule and its count.
        queries: (B, q) of the batch.
        prompts: (n, d) the pool; of deep prompts, the part of the first block is compared.
        keys: (n, q) its addresses, or their discriminants.
        projection: (d, q) trainable query projection of `l2p`; None for the other rules.

    Returns:
        Row numbers (k,) ascending, k = min(count, n); and for `l2p` the similarity term, a scalar
        that is differentiable in prompts and projection: the sum of cosines of the selected rows
        divided by B.
    """
    if options.selection == "all" or options.count == 0:
        return torch.arange(prompts.shape[0] if options.count else 0, device=prompts.device), None
    if options.selection == "keyed":
        return rows_of_query(options, queries.mean(dim=0), keys), None
    if projection is None:
        raise ConfigError("prompts.selection=l2p needs a query projection, got none")
    addresses = prompts[:, : projection.shape[0]]
    similarity = F.normalize(queries @ projection.T, dim=-1) @ F.normalize(addresses, dim=-1).T
    rows = majority_vote(similarity.detach(), options.count)
    return rows, similarity[:, rows].sum() / queries.shape[0]
