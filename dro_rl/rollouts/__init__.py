"""Rollouts as a run leaves them: the log they are kept in, what it says about a run, and why a selection won."""
