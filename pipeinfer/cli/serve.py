"""``pipeinfer serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
from pathlib import Path
from typing import Any

from pipeinfer.cli.run import (
    Progress,
    add_execution,
    add_models,
    add_requests,
    note,
    open_engine,
    refuse_half_a_pair,
    refuse_no_timeout,
)
from pipeinfer.core.config import BUILTIN
from pipeinfer.core.errors import UserError, refuse
from stages.checkpoint.folder import is_gguf_name

KEY = "PIPEINFER_API_KEY"
MAX_NUM_SEQS = 8  # as an Engine has


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "serve",
        help="serve HTTP clients of OpenAI's interface",
        description="Serve /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /health, "
        "/metrics (for Prometheus), /openapi.json and a page at / that shows what is going on. Under mpirun or srun "
        "the job's ranks are used and rank 0 listens; otherwise --ranks N starts N ranks on this machine. SIGTERM ends "
        "the server.",
    )
    parser.set_defaults(command=serve)
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    http.add_argument("--port", type=int, default=8000, metavar="P", help="port, or 0 for a free one (default 8000)")
    http.add_argument("--api-key", metavar="KEY", help=f"what clients must send (default: ${KEY}; without, nothing)")
    http.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the model's id for clients (default: the name of the target's directory); `default` always works, too",
    )
    http.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="sequences at a time, waiting ones included (default 64); a sampled request has one for each choice",
    )
    http.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds to finish requests after SIGTERM (default 10)"
    )
    add_requests(parser.add_argument_group("requests"), MAX_NUM_SEQS)
    add_models(parser.add_argument_group("models"))
    add_execution(parser.add_argument_group("execution"))


def serve(args: argparse.Namespace) -> int:
    """Serve as ``args`` say, until a signal ends it."""
    refuse_half_a_pair(args)
    refuse_no_timeout(args)
    if args.max_queue < 1:
        refuse(f"--max-queue {args.max_queue}", "use at least 1")
    if not 0 <= args.grace < math.inf:
        refuse(f"--grace {args.grace:g}", "use seconds")
    api_key = os.environ.get(KEY) or None if args.api_key is None else args.api_key
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        refuse("the API key is not printable ASCII text", f"use letters and digits, in --api-key or {KEY}")
    refuse_no_extra()
    from launch.collector import frozen
    from pipeinfer.serve.server import Server

    name = model_id(args)
    with Server(args.host, args.port, name, api_key, args.max_queue, args.grace) as server:
        with Progress("loading the models"):
            opened = open_engine(
                args,
                lambda engine: server.start(),  # on the head, before anything is loaded
                policy=args.policy,
                timeout_s=args.timeout,
                trace=args.trace,
            )
        if not opened.is_head:
            # srun signals all ranks; the head lets them go once the requests have ended.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with frozen(), opened as engine:
            if engine is None:
                return 0  # this rank has served
            if not engine.is_threaded:
                raise UserError("this MPI grants one thread only, and the server needs more; use another MPI")
            server.serve(engine, lambda: note(f"pipeinfer: {name} is served at {server.url}"))
    return 0


def refuse_no_extra() -> None:
    """Refuse to serve without the packages for it."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        refuse(f"`pipeinfer serve` needs {' and '.join(missing)}", "pip install 'pipeinfer[serve]'")


def model_id(args: argparse.Namespace) -> str:
    """The id of the model that ``args`` name."""
    if args.served_model_name is not None:
        if not args.served_model_name:
            refuse("an empty --served-model-name", "give a name, or leave it out")
        return str(args.served_model_name)
    if args.target in (None, BUILTIN):
        return BUILTIN
    path = Path(args.target).absolute()
    return path.stem if is_gguf_name(path) else path.name
