"""Common parts of all plots: colours, axes, a title with the kind of execution, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pipeinfer.core.errors import refuse

BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
"""Of the palette of Okabe and Ito, which people with any kind of colour vision can tell apart."""
INK, GREY, PALE = "#222222", "#8C8C8C", "#D9D9D9"
DOTS_PER_INCH = 150
TITLE_INCHES = 0.4


def new_figure(width: float, height: float, execution: str, about: list[str]) -> Figure:
    """A figure of so many inches, titled with the ``execution`` (``real``, ``emulated``, ``simulated``) and those parts
    of ``about`` that say something."""
    whole = height + TITLE_INCHES
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, height / whole))
    figure = Figure(figsize=(width, whole), layout=layout)
    look: dict[str, Any] = {"va": "top", "color": INK, "transform": figure.dpi_scale_trans}
    loud = figure.text(0.1, whole - 0.12, execution.upper(), weight="bold", size=13, **look)
    ends = 0.1 + loud.get_window_extent().width / figure.dpi
    figure.text(ends + 0.2, whole - 0.15, "  ·  ".join(part for part in about if part), size=10, **look)
    return figure


def tidy(axes: Axes) -> None:
    """Remove axes decoration without information."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)
    axes.set_axisbelow(True)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, in the form that its ending says. Raises UserError where that cannot be done."""
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        refuse(f"{path} cannot be written ({error.strerror})", "name a file in a directory that is writable")
