"""Whole experiments on one machine."""
