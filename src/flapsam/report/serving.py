"""The viewer's server, which listens on this machine only, at an address that cannot be guessed."""

import secrets
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from flapsam.base.errors import FlapsamError
from flapsam.report.page import pages
from flapsam.report.scene import SHOWN, Scene, nifti_of

HOST = "127.0.0.1"
VIEWER = Path(__file__).parent / "viewer"
FILES = {"niivue.js": "text/javascript", "view.js": "text/javascript", "view.css": "text/css"}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; base-uri 'self'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Key = tuple[str, ...]
"""Names that identify a scene, such as site and case."""
Content = tuple[str, bytes]
"""Media type and bytes of an answer."""


class ViewServer:
    """Serves scenes, and a page that links to them, until it is closed."""

    def __init__(self, scenes: Mapping[Key, Scene], *, port: int = 0) -> None:
        """Listen on the loopback interface.

        Args:
            scenes: the scenes to serve.
            port: the port to listen on; a free one if 0.

        Raises:
            FlapsamError: the port is taken, or NiiVue is missing from this installation.
        """
        missing = [name for name in FILES if not (VIEWER / name).exists()]
        if missing:
            raise FlapsamError(f"{VIEWER / missing[0]}: the viewer's file is missing; install flapsam again")
        self.scenes = scenes
        self.start_page: Callable[[], str] | None = None
        """Returns the page at the root; None without such a page."""
        self.token = secrets.token_urlsafe(24)
        try:
            self.http = ThreadingHTTPServer((HOST, port), _handler(self))
        except OSError as error:
            raise FlapsamError(
                f"port {port}: cannot be used ({error.strerror}); leave out --port to use a free one"
            ) from error
        self.root = f"/{self.token}/"
        self.address = f"http://{HOST}:{self.http.server_port}{self.root}"

    def run(self) -> None:
        """Answer requests until ``close`` or an interruption."""
        self.http.serve_forever()

    def close(self) -> None:
        """Stop answering and release the port."""
        self.http.shutdown()
        self.http.server_close()

    def link(self, *key: str) -> str:
        """The path at which a scene opens on this server."""
        return f"{self.root}case/{'/'.join(quote(part, safe='') for part in key)}/"

    def content(self, path: str) -> Content | None:
        """The content at a request's path; None if there is nothing."""
        first, *parts = [unquote(part) for part in urlsplit(path).path.split("/")[1:]]
        if not secrets.compare_digest(first.encode(), self.token.encode()):
            return None
        if parts == [""] and self.start_page:
            return "text/html; charset=utf-8", self.start_page().encode()
        if len(parts) == 1 and parts[0] in FILES:
            return FILES[parts[0]], (VIEWER / parts[0]).read_bytes()
        if len(parts) > 2 and parts[0] == "case" and tuple(parts[1:-1]) in self.scenes:
            return self._of_scene(tuple(parts[1:-1]), parts[-1])
        return None

    def _of_scene(self, key: Key, name: str) -> Content | None:
        scene = self.scenes[key]
        if name == "":
            return "text/html; charset=utf-8", self._page(key, scene).encode()
        number = name.removesuffix(".nii")
        if number.isdecimal() and int(number) < len(scene.layers):
            return "application/octet-stream", nifti_of(scene.layers[int(number)].read())
        return None

    def _page(self, key: Key, scene: Scene) -> str:
        layers = [
            {
                "name": layer.name,
                "url": f"{self.link(*key)}{index}.nii",
                "opacity": SHOWN if index == 1 else 0,
                "fractions": layer.fractions,
            }
            for index, layer in enumerate(scene.layers)
        ]
        segments = [{"value": s.value, "name": s.name, "colour": s.colour, "rgb": s.rgb} for s in scene.legend]
        described: dict[str, Any] = {"title": scene.title, "layers": layers, "segments": segments}
        return pages().get_template("view.html").render(scene=described, base=self.root, links=list(self._links(key)))

    def _links(self, key: Key) -> Iterator[tuple[str, str]]:
        if self.start_page:
            yield "report", self.root
        keys = list(self.scenes)
        place = keys.index(key)
        if place > 0:
            yield "previous case", self.link(*keys[place - 1])
        if place + 1 < len(keys):
            yield "next case", self.link(*keys[place + 1])


def _handler(server: ViewServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                content = self._allowed() and server.content(self.path)
            except FlapsamError as error:
                return self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", str(error).encode())
            if not content:
                return self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"Nothing is at this address.\n")
            self._answer(HTTPStatus.OK, *content)

        def _allowed(self) -> bool:
            # Another web site could let its own name point to this machine, and then read the answers (DNS rebinding).
            return self.headers.get("Host") in [f"{name}:{server.http.server_port}" for name in (HOST, "localhost")]

        def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Log nothing, because addresses contain the token."""

    return Handler
