"""Which heads stay where single scores do not tell: searches that look at heads together."""
