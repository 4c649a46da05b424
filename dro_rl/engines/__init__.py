"""Rollout engines: what turns prompts into sampled completions with log q."""
