"""Evaluate: what a model can do, what it costs, and both beside another model."""
