"""The report as data (sections of text, figures and tables), and the two ways to write it: one HTML file that needs
nothing else, and Markdown.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from mnv4_ops.bench import plots
from mnv4_ops.bench.errors import BenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A text, what to sort by (the text itself if None), and whether it is good or bad news."""

    text: str
    key: float | None = None
    mood: str = ""

    @classmethod
    def number(cls, value: float | None, form: str, suffix: str = "") -> Cell:
        return cls("", None) if value is None else cls(f"{value:{form}}{suffix}", value)

    @classmethod
    def ratio(cls, value: float | None, mark: str = "") -> Cell:
        """A speed-up: won from 1.005 on, lost below 0.995, undecided between."""
        if value is None:
            return cls("")
        mood = "good" if value >= 1.005 else "bad" if value < 0.995 else ""
        return cls(f"{value:.2f}x{mark}", value, mood)

    @classmethod
    def against_best(cls, value: float | None, headline: bool) -> Cell:
        """The ratio to the best peer: bad news, whatever it is, where a peer is missing that has to be among them."""
        return cls.ratio(value) if headline or value is None else cls(f"{value:.2f}x *", value, "bad")


@dataclass(frozen=True)
class Table:
    """`columns` are headings; every row has as many cells."""

    caption: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]

    @property
    def texts(self) -> set[int]:
        """Columns of words: without numbers to sort by, and not of ranges."""
        return {
            index
            for index in range(len(self.columns))
            if all(row[index].key is None and not row[index].text[:1].isdigit() for row in self.rows)
        }


@dataclass(frozen=True)
class Picture:
    """An SVG with its description for those who do not see it."""

    svg: str
    text: str

    @classmethod
    def of(cls, made: Figure, text: str) -> Picture:
        svg = plots.render(made, "svg").decode()
        # ids of two figures in one page must differ, and the prolog has no place inside of HTML
        svg = svg[svg.index("<svg") :]
        prefix = "f" + re.sub(r"\W+", "", text.lower())
        svg = re.sub(r'(\bid="|url\(#|href="#)', lambda found: found.group(1) + prefix, svg)
        return cls(svg, text)


@dataclass
class Section:
    """`notes` are paragraphs below the tables; `anchor` is its address inside of the page."""

    anchor: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)


def html(title: str, lead: str, sections: list[Section]) -> str:
    """One page: style, script and figures inside."""
    if importlib.util.find_spec("jinja2") is None:
        raise BenchError("the report needs jinja2, which is not installed: pip install 'mnv4-ops[bench]'")
    import jinja2

    folder = resources.files("mnv4_ops.bench") / "data"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    template = environment.from_string((folder / "report.html.j2").read_text())
    style, script = ((folder / name).read_text() for name in ("report.css", "report.js"))
    return template.render(title=title, lead=lead, sections=sections, style=style, script=script)


def _breakable(text: str) -> Any:
    """Lets a long name in a heading go on in the next line after a dot, a parenthesis or a sign."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"(?<=[.(=+])(?=\w)", "<wbr>", str(markupsafe.escape(text))))


def markdown(title: str, lead: str, sections: list[Section]) -> str:
    """The same without figures."""
    lines = [f"# {title}", "", lead, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.intro:
            lines += [section.intro, ""]
        for table in section.tables:
            lines += [f"### {table.caption}", "", *_markdown_table(table), ""]
        lines += [f"- {note}" for note in section.notes]
        lines += [f"- {name}: {value}" for name, value in section.details.items()]
        if section.notes or section.details:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
    def line(texts: Any) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|---" + "|---:" * (len(table.columns) - 1) + "|"
    return [line(table.columns), rule, *(line(cell.text for cell in row) for row in table.rows)]
