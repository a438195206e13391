"""The engine between hospitals: NVFLARE carries the bytes over mutual TLS. Nothing else imports it.

``kits`` makes and reads start-up kits, ``participant`` runs a server or a site, ``coordination`` submits a run and follows
it; ``controller`` and ``executor`` are what NVFLARE loads at the server and at a site.
"""
