"""Engines carry packets between server and sites. The algorithm itself does not depend on any of them."""
