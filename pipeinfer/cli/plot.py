"""``pipeinfer plot``: pictures of traces and of result files."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.core.errors import UserError, refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeinfer.runtime.timeline import Timeline

PICTURES = (".png", ".svg", ".pdf")
KINDS = ("timeline", "speed", "depth", "itl", "ablation")


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "plot",
        help="draw a trace or results",
        description="Draw the timeline of a job from the traces of `pipeinfer run --trace FILE`: a lane per role, "
        "passes coloured by their outcome, cancels as arrows. Or draw result files of `pipeinfer bench`. Pictures "
        "need matplotlib; a .json for ui.perfetto.dev does not.",
    )
    parser.set_defaults(command=plot)
    parser.add_argument(
        "what", nargs="+", metavar="WHAT", help="FILE for the traces FILE.rank0, FILE.rank1, ...; or result files"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="a .png, .svg or .pdf; for a trace also a .json"
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="timeline (of traces); of results: speed (against acceptance), depth (speed against ranks), itl (gaps "
        "between emissions), ablation (bars). Default: by the axes in which the rows differ",
    )
    parser.add_argument("--from", dest="start", type=float, metavar="MS", help="timeline: start time")
    parser.add_argument("--to", dest="end", type=float, metavar="MS", help="timeline: end time")


def plot(args: argparse.Namespace) -> int:
    """Draw what ``args`` say."""
    ending = args.output.suffix.lower()
    if ending not in (*PICTURES, ".json"):
        refuse(f"--output {args.output}", f"end it in {', '.join(PICTURES)} or .json")
    if ending != ".json" and importlib.util.find_spec("matplotlib") is None:
        refuse("pictures need matplotlib", "pip install 'pipeinfer[plot]', or -o FILE.json for ui.perfetto.dev")
    if not is_trace(args.what[0]):
        draw_results(args, ending)
    elif args.kind not in (None, "timeline"):
        refuse(f"--kind {args.kind} of a trace", "leave --kind out, or name result files")
    elif ending == ".json":
        from pipeinfer.runtime.perfetto import write_perfetto

        write_perfetto(timeline(args.what), args.output)
    else:
        from pipeinfer.plots.lanes import draw_lanes

        save(draw_lanes(timeline(args.what), args.start, args.end), args.output)
    return 0


def is_trace(name: str) -> bool:
    """Whether ``name`` means traces rather than results."""
    from pipeinfer.runtime.trace import MARK, rank_file

    try:
        with open(name, "rb") as file:
            return MARK.encode() in file.read(64)
    except OSError:
        return rank_file(name, 0).exists()


def timeline(names: list[str]) -> Timeline:
    """The timeline of one job from the traces ``names``, as far as they can be read."""
    from pipeinfer.cli.replay import find
    from pipeinfer.cli.streams import say
    from pipeinfer.runtime.timeline import read_timeline
    from pipeinfer.runtime.trace import Trace

    traces = [Trace(path) for path in find(names)]
    found = read_timeline(traces)
    for trace in traces:
        if trace.damage:
            say(f"{trace.path}: {trace.damage}, the rest is lost")
    return found


def draw_results(args: argparse.Namespace, ending: str) -> None:
    """Draw result files."""
    if args.kind == "timeline" or ending == ".json" or args.start is not None or args.end is not None:
        refuse(f"{args.what[0]} is no trace", "name the FILE of `pipeinfer run --trace FILE`")
    from pipeinfer.plots import charts
    from pipeinfer.plots.results import kind_of, read_results

    rows = read_results([Path(name) for name in args.what])
    draw = {
        "speed": charts.draw_speed,
        "depth": charts.draw_depth,
        "itl": charts.draw_gaps,
        "ablation": charts.draw_bars,
    }
    save(draw[args.kind or kind_of(rows)](rows), args.output)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``."""
    from pipeinfer.plots import style

    style.save(figure, path)


def draw_traced(name: str, hosts: set[str]) -> str:
    """After a job with traces called ``name`` on ``hosts``: make its ``name.json`` if all traces are at hand. Returns a
    line for people."""
    path = Path(f"{name}.json")
    if len(hosts) > 1:
        return f"bring the traces {name}.rank* of all hosts together, then: pipeinfer plot {name} -o {path}"
    from pipeinfer.runtime.perfetto import write_perfetto

    try:
        write_perfetto(timeline([name]), path)
    except UserError as error:  # the answer is printed already; a failed picture is no error
        return str(error)
    return f"{path} shows the run at ui.perfetto.dev"
