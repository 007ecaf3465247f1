"""Editing: find the neurons that carry a concept, suppress them, show what that did."""
