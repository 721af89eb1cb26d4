"""What fedprompt can do and how fast, measured: `python -m benchmarks.NAME` from the checkout.

`harness` holds what all of them share; `results/` what they measured, which the pages quote;
`quotes` shows that each quoted figure equals what was measured.
"""
