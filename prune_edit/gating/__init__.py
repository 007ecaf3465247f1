"""The gate: rules over measured figures, decided on the worst side of their intervals."""
