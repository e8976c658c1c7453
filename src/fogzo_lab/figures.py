"""Figures as SVG in which text stays text, and the same numbers give the same bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]


@contextmanager
def drawing(
    target: Path | IO[str], size: tuple[float, float], font_size: float = 8
) -> "Iterator[Figure]":
    """A figure to draw into; it is written when the context ends without an error.

    Args:
        target: A file, by path or open for text.
        size: Width and height in inches.
        font_size: In points.
    """
    import matplotlib  # here, as half of the commands draw nothing
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "fogzo", "font.size": font_size}
    ):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        layout = figure.get_layout_engine()
        assert layout is not None
        layout.execute(figure)
        figure.set_layout_engine("none")
        # The layout's solver orders its terms by address, which moves axes by a last bit.
        for axes in figure.axes:
            left, bottom, width, height = (round(s, 5) for s in axes.get_position().bounds)
            axes.set_position((left, bottom, width, height))
        # `savefig` would draw everything once more before, for what this figure does not have.
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None})
