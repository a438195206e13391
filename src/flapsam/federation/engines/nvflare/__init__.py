"""The engine between hospitals. NVFLARE carries the bytes over mutual TLS, and no other part of flapsam imports it.

``kits`` makes and reads start-up kits. ``preflight`` checks a site in advance. ``launch`` runs a server or a site. ``jobs``
submits a run and follows it. NVFLARE loads ``controller`` at the server and ``executor`` at a site.
"""
