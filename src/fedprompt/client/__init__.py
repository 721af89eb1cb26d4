"""The client's half of a round: a LightningModule, and the only place that drives it."""
