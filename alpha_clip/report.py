"""One self-contained HTML page from text, tables and pictures."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;
color:#1d2129}h1{font-size:1.7rem}h2{font-size:1.2rem;margin-top:2.2rem}
table{border-collapse:collapse;font-size:.95rem}
td,th{padding:.3rem .9rem;border-bottom:1px solid #dde1e6;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;height:auto}
pre{background:#f4f5f7;padding:.8rem;overflow-x:auto}.note{color:#57606a;font-size:.92rem}
"""


@dataclass
class Report:
    """A page that grows from top to bottom.

    Attributes:
        title: Its heading.
    """

    title: str
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f'<p class="note">{escape(text)}</p>')

    def code(self, text: str) -> None:
        """Add lines to be typed."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """Add a table; the first column is the row's name."""
        lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
        lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
        self._parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")

    def picture(self, file: Path, description: str) -> None:
        """Embed a PNG."""
        data = base64.b64encode(file.read_bytes()).decode()
        self._parts.append(f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">')

    def write(self, file: Path) -> None:
        """Write the page."""
        body = "\n".join(self._parts)
        file.write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(self.title)}'
            f"</title><style>{_STYLE}</style><h1>{escape(self.title)}</h1>\n{body}\n</html>\n",
            encoding="utf-8",
        )
