"""Differential privacy of a site's patients: how much noise a run needs, and how much privacy a site has spent."""
