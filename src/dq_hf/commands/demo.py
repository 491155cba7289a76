"""`dq-hf demo`: the web demo."""

import socket

from .options import add_command, add_model_options, check_device


def register(commands):
    command = add_command(commands, "demo", run, "Serve a web demo that samples and reconstructs images.")
    add_model_options(command)
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="Listen at this address; 0.0.0.0 can be reached from outside (default %(default)s).",
    )
    command.add_argument(
        "--port",
        type=int,
        default=7860,
        help="Listen at this port; 0 means any free one (default %(default)s).",
    )


def run(args):
    port = check_address(args.host, args.port)
    device = check_device(args.device)

    from ..demo.page import serve

    serve(args.model, device, args.host, port)


def check_address(host, port):
    """The port, or a free one for 0; OSError now, not after the model is loaded, if it cannot be listened at."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must lie in 0 ... 65535, got {port}")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --port or --host") from error
