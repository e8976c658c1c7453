"""A table of text: the one shape that terminals, reports and pages of documentation show."""

from collections.abc import Sequence
from dataclasses import dataclass


def in_digits(value: float, digits: int) -> str:
    """A number to so many digits, but with all of those before its point, as people read it.

    >>> in_digits(0.012345, 3), in_digits(12345.6, 3)
    ('0.0123', '12,346')
    """
    # Beyond, as the perplexity of a network that has learned nothing may be, no reader counts them.
    whole = 10**digits - 0.5 <= abs(value) < 1e15
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Table:
    """Cells of text, of which the first column names the rows.

    Attributes:
        title: Above it; empty where a page has a heading of its own.
        heading: One cell per column.
        rows: Each with one cell per column.
        caption: Below it: what the numbers are.

    Raises:
        ValueError: If a row does not fit the heading.
    """

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        """Check the rows."""
        for row in self.rows:
            if len(row) != len(self.heading):
                raise ValueError(
                    f"the row {', '.join(row)!r:.80} has {len(row)} cells under "
                    f"{len(self.heading)} headings ({', '.join(self.heading)}): one cell per column"
                )

    def markdown(self) -> str:
        """The table in Markdown, numbers to the right, and its caption below.

        Raises:
            ValueError: If it has no rows: a page should not show an empty table.
        """
        if not self.rows:
            raise ValueError("it has no rows")
        lines = [self.heading, ["---"] + ["---:"] * (len(self.heading) - 1), *self.rows]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"{text}\n{self.caption}\n" if self.caption else text
