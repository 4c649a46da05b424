"""Rollouts: the engines that sample selections, and the log they are kept in."""
