"""Plans the longest context that a card can fine-tune, from symbolic formulas. Never imports torch."""

__version__ = "0.1.0"
