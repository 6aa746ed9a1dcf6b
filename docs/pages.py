"""A hook of MkDocs: pages that are generated from the code while the site is built, so that none can be out of date.

Every method of the registry, every public module and every notebook gets a page; mkdocstrings renders the docstrings.
In mkdocs.yml a name that ends in "/" stands for all generated pages below it. In a page of docs/, a comment such as
`<!-- methods: find -->` stands for a table: of the methods of a folder, the limits or sources of all methods, or the
options of the command line.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
from arxiv_links import ArxivLinks
from command_pages import commands
from method_pages import (
    PACKAGES,
    directive,
    group_of,
    limits_table,
    method_page,
    method_tables,
    methods,
    path_of,
    public,
    shown,
    sources_table,
)
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from interp.analyses import registry

ROOT = Path(__file__).resolve().parents[1]
ADMONITIONS = {"source": "quote", "differs": "note", "limits": "warning"}
"""section that only our docstrings have -> the admonition of the theme that it becomes"""
A = "interp.analyses"
REFERENCE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "test/heads": (
        "Tests of heads",
        f"{A}.causal",
        ("ablation_test", "curve", "causal_profile", "sweep", "controls"),
    ),
    "results": ("Results", f"{A}.results", ("result", "head_scores", "trials", "statistics", "codec")),
    "runs": ("Runs", "interp.runs", ("run", "plan", "steer", "safety", "results", "stage", "estimate")),
    "core": ("Models, prompts and heads", "interp", ("",)),
    "keeps": ("Reductions", "interp.hooks.read", ("keep",)),
    "head-lists": ("Head lists of other projects", f"{A}.results", ("head_list_formats",)),
    "identify": ("Helpers of the head scores", f"{A}.identify", ("",)),
    "steer": ("Profiles, choices and checks of edits", f"{A}.steer", ("",)),
    "kv": ("Key selection", f"{A}.kv", ("",)),
    "views": ("Parts of the views", f"{A}.views", ("explore", "qk_projection", "attention_lens", "head_roles")),
    "measures": ("Measures", f"{A}.measures", ("losses", "continuations", "head_outputs", "refusals")),
    "tasks": ("Tasks", f"{A}.tasks", ("", "standard")),
    "plots": ("Figures and reports", "interp", ("plots", "report")),
    "registry": ("Declarations", A, ("registry",)),
    "testing": ("Contracts for your own methods", "interp", ("testing",)),
    "errors": ("Errors", "interp", ("errors",)),
}
"""page -> its title, a package, and modules of it; an object is on the first page that exports it"""


class Page(NamedTuple):
    """A generated page: where it is in the navigation, and its Markdown."""

    group: str
    title: str
    text: str


def pages() -> dict[str, Page]:
    """Every page that is generated, by its path in docs."""
    made = {
        f"{folder}/{entry.name}.md": Page(group_of(entry), entry.title, method_page(entry))
        for folder in PACKAGES
        for entry in methods(folder)
    }
    seen: set[str] = set()
    for name, (title, package, modules) in REFERENCE.items():
        things = {path_of(thing): thing for thing in public(package, modules) if path_of(thing) not in seen}
        seen |= {*things}
        place = name if "/" in name else f"reference/{name}"
        made[f"{place}.md"] = Page("", title, "\n".join([f"# {title}\n", *map(directive, things.values())]))
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        cells = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
        text = "\n\n".join(text if kind == "markdown" else f"```py\n{text}\n```" for kind, text in cells)
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), path.stem)
        text = re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", text).replace("(../docs/", "(../")
        text += f"\n\nAs a notebook: `notebooks/{path.stem}.ipynb`.\n"
        made[f"tutorials/{path.stem}.md"] = Page("", title, text)
    return made


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    made = pages()
    config.nav = [_expanded(item, made) for item in config.nav or []]
    config.extra["made"] = made
    config.markdown_extensions.append(ArxivLinks())  # pyright: ignore
    return config


def _expanded(item: Any, made: dict[str, Page]) -> Any:
    """An item of the navigation, with the pages of a folder in place of its name, under their groups."""
    if isinstance(item, list):
        parts = [_expanded(part, made) for part in item]
        return [each for part in parts for each in (part if isinstance(part, list) else [part])]
    if isinstance(item, dict):
        return {title: _expanded(part, made) for title, part in item.items()}
    if not item.endswith("/"):
        return item
    groups: dict[str, list[dict[str, str]]] = {}
    for path, page in made.items():
        if path.startswith(item):
            groups.setdefault(page.group, []).append({page.title: path})
    if len(groups) == 1:
        return next(iter(groups.values()))
    return [{group: below} for group, below in groups.items()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, page in config.extra.pop("made").items():
        files.append(File.generated(config, path, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the tables, and let the names of methods in the text lead to their pages."""
    if page.file.generated_by:
        return markdown
    tables = {"limits": limits_table, "sources": sources_table, "commands": commands}
    tables |= {f"methods: {folder}": partial(method_tables, folder) for folder in PACKAGES}
    markdown = re.sub(r"<!-- (.+?) -->", lambda m: tables[m[1]]() if m[1] in tables else m[0], markdown)
    known = {shown(entry.thing): path_of(entry.thing) for entry in registry.iterate()}

    def link(m: re.Match[str]) -> str:
        name = re.split(r"[( ]", m[1] or "")[0]
        return f"[`{m[1]}`][{known[name]}]" if name in known else m[0]

    # neither code nor headings
    return re.sub(r"^```.*?^```|^#.*?$|(?<!\[)`([^`\n]+)`", link, markdown, flags=re.M | re.S)


def on_page_content(html: str, **_: Any) -> str:
    for section, kind in ADMONITIONS.items():
        html = html.replace(f'<details class="{section}" open>', f'<details class="{kind}" open>')
    return html
