"""Pages that this machine alone may see: where they are bound, and which requests are answered.

A page of 127.0.0.1 is out of reach for other machines, but not for the websites that its user
visits: one whose name is made to lead here (DNS rebinding) may read whatever is answered under that
name, and any may send forms. So only requests that name our own address are answered.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from wsgiref.simple_server import make_server

from lorasweep.core.settings import SettingsError

HOST = "127.0.0.1"

Environ = dict[str, Any]
WSGIApp = Callable[[Environ, Any], Iterable[bytes]]


def allowed_hosts(port: int) -> list[str]:
    """What a browser on this machine gives as Host for a page at the port."""
    return [f"{HOST}:{port}", f"localhost:{port}"]


def serve(app: WSGIApp, port: int) -> None:
    """Answer this machine's own requests with a WSGI app, until interrupted.

    Raises SettingsError if the port is taken.
    """
    check_port(port)
    server = make_server(HOST, port, own_requests_only(app, port))
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def check_port(port: int) -> None:
    """Raise SettingsError if another program listens at the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise SettingsError(
                f"port {port} is in use: stop what runs there (perhaps an earlier `lorasweep ui`) "
                "or give another with --port"
            ) from None


def own_requests_only(app: WSGIApp, port: int) -> WSGIApp:
    """The WSGI app, answering 403 to requests for other hosts and to those that others' pages send.

    MLflow's server does this itself, once it is told the `allowed_hosts`.
    """
    hosts = allowed_hosts(port)
    origins = {None, *(f"http://{host}" for host in hosts)}

    def answer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        if environ.get("HTTP_HOST") in hosts and environ.get("HTTP_ORIGIN") in origins:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "text/plain")])
        return [f"This page answers at http://{hosts[0]} only.\n".encode()]

    return answer
