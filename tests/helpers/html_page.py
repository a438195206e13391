"""Read an HTML page as text and tables, with the standard library's parser."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tables and the text of a page, and the addresses that it refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        """Id → rows of cells, with the header row first."""
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.parts: list[str] = []
        self._table: str | None = None
        self._cell: list[str] | None = None
        self.feed(html)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "xlink:href", "data", "action") and value]
        if tag == "table":
            self._table = attributes["id"]
            self.tables[self._table or ""] = []
        elif tag == "tr" and self._table is not None:
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._table is not None and self._cell is not None:
            self.tables[self._table][-1].append("".join(self._cell))
            self._cell = None
        elif tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
        if self._cell is not None:
            self._cell.append(data)
