"""A proxy between sites and server that decrypts everything they send, and records it.

It terminates the TLS connection of each site and opens its own to the server. This works only because the test holds every
private key: the proxy presents the server's certificate to the sites, and the calling site's certificate to the server.
"""

import select
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID


class RecordingProxy:
    def __init__(self, port: int, server_port: int, server_kit: Path, kit_of: Callable[[str], Path]) -> None:
        self.server_port = server_port
        self.kit_of = kit_of
        self.record = bytearray()
        self.callers: set[str] = set()
        self.lock = threading.Lock()
        startup = server_kit / "startup"
        self.as_server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(startup / "rootCA.pem"))
        self.as_server.load_cert_chain(startup / "server.crt", startup / "server.key")
        self.as_server.verify_mode = ssl.CERT_REQUIRED
        self.as_server.set_alpn_protocols(["h2"])
        self.listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self.as_server.wrap_socket(connection, server_side=True) as site:
                certificate = x509.load_der_x509_certificate(site.getpeercert(binary_form=True) or b"")
                name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
                self.callers.add(name)
                startup = self.kit_of(name) / "startup"
                as_site = ssl.create_default_context(cafile=str(startup / "rootCA.pem"))
                as_site.load_cert_chain(startup / "client.crt", startup / "client.key")
                as_site.set_alpn_protocols(["h2"])
                raw = socket.create_connection(("127.0.0.1", self.server_port))
                with as_site.wrap_socket(raw, server_hostname="localhost") as server:
                    self._relay(site, server)
        except (OSError, ValueError):
            connection.close()

    def _relay(self, site: ssl.SSLSocket, server: ssl.SSLSocket) -> None:
        peers = {site: server, server: site}
        while True:
            ready = [end for end in peers if end.pending()] or select.select(list(peers), [], [])[0]
            for end in ready:
                data = end.recv(1 << 16)
                if not data:
                    return
                with self.lock:
                    self.record += data
                peers[end].sendall(data)
