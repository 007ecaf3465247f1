"""The small bundled model, and the recipe that made it."""
