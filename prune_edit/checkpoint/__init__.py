"""Slim checkpoints: read, slice, write, verify."""
