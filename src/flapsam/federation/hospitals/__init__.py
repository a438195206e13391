"""A run between hospitals, whatever the engine: the handshake, and the server's and the site's side of it."""
