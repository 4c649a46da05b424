"""Expectation and maximisation: sample, weigh, train; which questions when, and how a run goes on."""
