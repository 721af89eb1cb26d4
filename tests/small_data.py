"""Data sets cut down to what a test needs."""

from __future__ import annotations

FEW_DIGITS = "data={name: digits, train: 0.12, validation: 0.05, test: 0.05}"
"""214 images to train on, 90 and 90 to evaluate."""
