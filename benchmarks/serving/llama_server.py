"""llama.cpp's server, as the package xllamacpp has it, in a process of its own until SIGTERM.

python -m benchmarks.serving.llama_server --model F --port P --parallel N --context T --threads T [--draft F --n-max K]
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any


def parameters(library: Any, args: argparse.Namespace) -> Any:
    """What ``args`` ask for as CommonParams of the package ``library``; what is not named stays as llama.cpp has it."""
    wanted = library.CommonParams()
    wanted.model.path = args.model
    wanted.port = args.port
    wanted.n_parallel = args.parallel
    wanted.n_ctx = args.parallel * args.context
    wanted.cont_batching = True
    wanted.fit_params = False
    wanted.verbosity = 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = args.threads
    wanted.sampling.temp = 0.0
    wanted.sampling.top_k = 1
    kind = library.ggml_type.GGML_TYPE_F32 if args.fp32_cache else library.ggml_type.GGML_TYPE_F16
    wanted.cache_type_k = wanted.cache_type_v = kind
    if args.draft:
        wanted.speculative.types = [library.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        draft = wanted.speculative.draft
        draft.mparams.path = args.draft
        draft.n_max = args.n_max
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = args.threads
        draft.cache_type_k = draft.cache_type_v = kind
    return wanted


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE", help="GGUF file with a tokenizer")
    parser.add_argument("--draft", default="", metavar="FILE", help="GGUF file of the draft (default: no speculation)")
    parser.add_argument("--n-max", type=int, default=8, metavar="K", help="tokens of a draft (default 8)")
    parser.add_argument("--port", type=int, required=True, metavar="P")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="requests at a time (default 1)")
    parser.add_argument("--context", type=int, default=1024, metavar="T", help="tokens of a request (default 1024)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default 1)")
    parser.add_argument("--fp32-cache", action="store_true", help="keys and values in fp32 (default: fp16)")
    args = parser.parse_args()
    import xllamacpp

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = xllamacpp.Server(parameters(xllamacpp, args))
    print(f"served at {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM})
    return 0


if __name__ == "__main__":
    sys.exit(main())
