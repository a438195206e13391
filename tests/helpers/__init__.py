"""Shared helpers of the tests: synthetic data, runs, hospitals and the command line."""
