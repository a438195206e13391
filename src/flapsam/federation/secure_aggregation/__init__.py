"""Secure aggregation: the server learns the sum of the sites' changes, and no site's own."""
