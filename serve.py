"""An OpenAI-compatible server for a diffusion language model: python serve.py model=PATH [port=8000] [key=value …]"""

import os
import re
import socket
import sys

from common.config import parse_or_help
from common.errors import UserError, one_line_errors
from common.jobs import ServeConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; UserError where the address is taken or is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(f"port={port}: {host} cannot be listened on ({error.strerror}); give another port") from None
    return bound


def api_key(config: ServeConfig) -> str:
    """The key clients must show, "" for none; UserError where others could reach a server without one."""
    key = os.environ.get(config.api_key_env, "")
    if not key and config.host not in LOOPBACK:
        raise UserError(f"host={config.host} can be reached by others: set a key in the variable {config.api_key_env}")
    return key


def check_origins(config: ServeConfig) -> None:
    """UserError for an origin that no browser would send."""
    for origin in config.cors_origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise UserError(f"cors_origins: {origin!r} is no origin; write it as http://localhost:3000, or *")


@one_line_errors
def main() -> None:
    config = parse_or_help("serve", sys.argv[1:], __doc__)
    check_origins(config)
    key, bound = api_key(config), listen(config.host, config.port)
    import uvicorn  # torch and the rest, which --help and a taken port do without

    from common.runtime import console
    from models.defaults import load_one
    from models.files import told_as
    from serving.app import make_app

    with told_as("model", "model_base"):
        loaded = load_one(config)
    app = make_app(config, loaded, key)
    console.print(f"{app.state.server.name} at http://{config.host}:{config.port}/ (API: /v1; a page: /)")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    server.run(sockets=[bound])


if __name__ == "__main__":
    main()
