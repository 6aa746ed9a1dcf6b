"""An extension of Python-Markdown: arXiv ids in the text become links."""

import re
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor


class ArxivLinks(Extension):
    """Links from arXiv ids, such as 2404.15574, to the papers."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_ArxivId(r"\b(\d{4}\.\d{5})\b", md), "arxiv", 60)


class _ArxivId(InlineProcessor):
    ANCESTOR_EXCLUDES = ("a", "code")

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element, int, int]:  # pyright: ignore
        link = Element("a", href=f"https://arxiv.org/abs/{m[1]}")
        link.text = m[1]
        return link, m.start(0), m.end(0)
