"""The aggregator `pfpt`: which of the variants merges."""

from __future__ import annotations

from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.aggregation.pfpt.map.inference import aggregate_map
from fedprompt.aggregation.pfpt.options import PfptOptions
from fedprompt.aggregation.pfpt.paper import aggregate_paper
from fedprompt.aggregation.pfpt.released import aggregate_released


@aggregators.register("pfpt", PfptOptions)
class Pfpt(Aggregator):
    """Probabilistic matching of prompt sets. See `Aggregator.merge`.

    State of `map`: see `Memory`, and `prompts` (n, d) and, with keys, `keys` (n, q), which stand in
    for `previous` and `previous_keys`. State of the other variants: their networks.
    """

    def __init__(self, options: PfptOptions) -> None:
        self.options = options

    def merge(self, given: AggregationInput) -> Aggregation:
        """Match local and remembered prompts; average what belongs together."""
        options = self.options
        if options.variant == "paper":
            return aggregate_paper(given, options.literal)
        if options.variant == "released":
            return aggregate_released(given, options.literal)
        return aggregate_map(given, options)
