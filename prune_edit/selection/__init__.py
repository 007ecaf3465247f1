"""Which units stay where single scores do not tell: searches that look at units together."""

SEARCHES = ("greedy", "gates")
"""Names of the searches; both look for units at a budget, with the weights as they are."""
