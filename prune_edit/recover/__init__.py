"""What makes up for the removed units: their mean as a bias, and tuning of what stays."""
