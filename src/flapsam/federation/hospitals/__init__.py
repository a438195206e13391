"""A run between hospitals on any engine: the handshake, the server's side and the site's side."""
