"""NVFLARE's connections between the processes of one participant: Unix sockets in a folder that only its user may enter.

NVFLARE's own driver listens on a TCP port of the loopback interface without a password, so every user of the machine could
connect to it and be served like the participant's own job.
"""

import os
import secrets
import socket
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.drivers.socket_conn import ConnectionHandler, SocketConnection

from flapsam.federation.engines.nvflare.launch import SOCKETS

SCHEME = "unix"


class Listener(ThreadingMixIn, UnixStreamServer):
    """Accepts connections on a Unix socket."""

    daemon_threads = True
    ssl_context = None

    def __init__(self, driver: "UnixDriver", connector: ConnectorInfo) -> None:
        self.driver = driver
        self.connector = connector
        super().__init__(connector.params[DriverParams.PATH.value], ConnectionHandler)


class UnixDriver(BaseDriver):
    """NVFLARE's driver for Unix sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: Listener | None = None

    @staticmethod
    def supported_transports() -> list[str]:
        """The schemes of addresses that this driver serves."""
        return [SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """What NVFLARE needs to know about the driver."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: False}

    def listen(self, connector: ConnectorInfo) -> None:
        """Accept connections until the driver is shut down."""
        self.connector = connector
        self.listener = Listener(self, connector)
        self.listener.serve_forever()

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect, and read until the connection is closed."""
        self.connector = connector
        line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        line.connect(connector.params[DriverParams.PATH.value])
        connection = SocketConnection(line, connector)
        self.add_connection(connection)
        connection.read_loop()
        self.close_connection(connection)

    def shutdown(self) -> None:
        """Close all connections and stop listening."""
        self.close_all()
        if self.listener:
            self.listener.shutdown()

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Choose the address of a new listener, twice: for those who connect, and to listen at."""
        url = f"{scheme}://0{Path(os.environ[SOCKETS]) / secrets.token_hex(8)}"
        return url, url
