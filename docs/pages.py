"""A hook of mkdocs: pages that are made from the code while the site is built, so that none of them can go stale.

A page for each method from its docstring card, pages of reference from signatures and docstrings, the command line from
its own help, the notebooks from their first cells. In mkdocs.yml a name that ends in "/" stands for all pages below it.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jupytext
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import interp
from interp import cli, errors, steerings, studies
from interp.analyses import identify, steer, tasks
from interp.analyses import kv as keys
from interp.analyses.causal.pruning import pruning_curve
from interp.analyses.causal.sweep import sweep_sets
from interp.cards import Card, card
from interp.hooks.edit.edit import Edit
from interp.hooks.read import keep

ROOT = Path(__file__).resolve().parents[1]
LINE = 80
"""characters of a line of preformatted text"""
FULL = 98
"""characters from which on a line of a docstring was broken by the width of the file"""
LAST_WORDS = "<!-- every method's last word -->"
CONTAINERS = {"Edits", "Profile"}
"""what steer exports beside methods"""
RESULTS = {"KVTask", "KeyCurve", "asked"}
"""what keys exports beside methods"""
VIEWS = ("joint.joint", "vocabulary.vocabulary", "vocabulary.ov_tokens", "lens.train_lens", "functions.functions")
"""views in interp.analyses, beside interp.explore"""
CORE = (
    "load", "Prompts", "Head", "HeadSet", "HeadLayout", "HeadScores", "capture", "ablate", "Intervention", "steering",
    "bridge", "doctor",
)  # fmt: skip
COMMANDS = {
    "attention_influence": "interp score retrieval,influence MODEL --out DIR",
    "ships": "interp safety MODEL --out DIR",
    "sahara": "interp safety MODEL --out DIR",
    "profile": "interp steer MODEL --method METHOD --task TASK --out DIR",
    "choose": "interp steer MODEL --method METHOD --task TASK --out DIR",
    "steer_check": "interp steer MODEL --method METHOD --task TASK --out DIR",
    "ablation_test": "interp score retrieval MODEL --out DIR",
    "key_curve": "interp score retrieval,semantic,key-selectors MODEL --out DIR",
    "causal_curve": "interp safety MODEL --out DIR",
    "make_report": "interp report MODEL -o report.html",
    "explore": "interp score retrieval MODEL --out DIR --explore 1024",
}
"""commands that run a method which does not give them its name"""

_ITEM = re.compile(r'"|\w+(?:, \w+)*: |(?:Raises|Source|Differs|Cannot show)\b')
"""how a line of a docstring begins that does not continue the one before"""


class Method(NamedTuple):
    """A method and the name that a user calls it by."""

    shown: str
    thing: Any

    @property
    def name(self) -> str:
        return self.shown.rpartition(".")[2]

    @property
    def file(self) -> str:
        return str(Path(inspect.getfile(inspect.unwrap(self.thing))).resolve().relative_to(ROOT))

    @property
    def command(self) -> str:
        """The command that runs it; "" where there is none."""
        short = {long: name for name, long in studies.SHORT.items()}
        if self.name in studies.OF_HEADS:
            return f"interp score retrieval,{self.name} MODEL --out DIR"
        if self.name in (*studies.ORDER, *studies.MORE):
            return f"interp score {short.get(self.name, self.name)} MODEL --out DIR"
        method = next((name for name, kind in steerings.METHODS.items() if kind is self.thing), None)
        if method is not None:
            return f"interp steer MODEL --method {method} --task TASK --out DIR"
        return COMMANDS.get(self.name, "")


def methods() -> dict[str, list[Method]]:
    """Every public method by the folder of its page."""
    steering = [Method(f"steer.{name}", getattr(steer, name)) for name in steer.__all__ if name not in CONTAINERS]
    edits = [method for method in steering if inspect.isclass(method.thing) and issubclass(method.thing, Edit)]
    functions = [method for method in steering if method not in edits and method.name != "steer_check"]
    checks = [Method(f"interp.{name}", getattr(interp, name)) for name in ("ablation_test", "causal_curve", "sweep")]
    checks += [
        Method("steer.steer_check", steer.steer_check),
        Method("analyses.pruning.pruning_curve", pruning_curve),
        Method("analyses.sweep.sweep_sets", sweep_sets),
    ]
    views = [Method("interp.explore", interp.explore)]
    for path in VIEWS:
        module, _, name = path.partition(".")
        views.append(Method(f"analyses.{path}", getattr(import_module(f"interp.analyses.{module}"), name)))
    return {
        "find": [Method(f"identify.{name}", getattr(identify, name)) for name in identify.__all__],
        "steer": edits + functions,
        "check": checks,
        "keys": [Method(f"analyses.keys.{name}", getattr(keys, name)) for name in keys.__all__ if name not in RESULTS],
        "views": views,
    }


def pages() -> dict[str, str]:
    """Markdown of every page that is made here, by its path in docs, in the order of the navigation."""
    made = {
        f"{folder}/{method.name}.md": method_page(method) for folder, found in methods().items() for method in found
    }
    made["reference/keeps.md"] = keeps_page()
    made["reference/core.md"] = reference_page(
        "Models, prompts, heads, contexts", [Method(f"interp.{name}", getattr(interp, name)) for name in CORE]
    )
    made["reference/tasks.md"] = reference_page(
        "Tasks", [Method(f"tasks.{n}", getattr(tasks, n)) for n in tasks.__all__ if callable(getattr(tasks, n))]
    )
    plots = import_module("interp.plots")
    drawn = [Method(f"plots.{name}", getattr(plots, name)) for name in plots.__all__ if callable(getattr(plots, name))]
    made["reference/plots.md"] = reference_page(
        "Figures and reports", [*drawn, Method("interp.make_report", interp.make_report)]
    )
    made["reference/errors.md"] = errors_page()
    made["cli.md"] = cli_page()
    made["notebooks.md"] = notebooks_page()
    return made


def method_page(method: Method) -> str:
    """One method: its card, part by part."""
    told = card(method.thing)
    parts = [f"# {method.shown}", prose(told.sentence), signature(method)]
    if told.formulas:
        parts += ["## Formula", preformatted("\n\n".join(told.formulas))]
    if told.notes:
        parts += ["## Settings and terms", "\n".join(notes(told, method.thing))]
    labelled = (("Raises", told.raises), ("Source", told.source), ("Differs", told.differs))
    parts += [f"**{label}.** {prose(capital(said))}" for label, said in labelled if said]
    if told.cannot_show:
        parts.append(f'!!! warning "What it cannot show"\n\n    {prose(capital(told.cannot_show))}')
    if method.command:
        parts.append(f"**On the command line.** `{method.command}`")
    return "\n\n".join([*parts, f"**In the code.** `{method.file}`"]) + "\n"


def notes(told: Card, thing: Any) -> Iterator[str]:
    """Sentences as a list; one that begins with a setting's name has it in code."""
    known = set(inspect.signature(thing).parameters)
    for said in told.notes:
        head = re.match(r"((?:\w+, )*\w+)(?=[ :=])", said)
        names = head[1].split(", ") if head else []
        if head and set(names) <= known:
            shown = ", ".join(f"`{name}`" for name in names)
            yield f"- {shown}{prose(said[head.end() :])}"
        else:
            yield f"- {prose(said)}"


def keeps_page() -> str:
    """What a capture can keep: meaning, shape and cost."""
    kinds = [getattr(keep, name) for name in keep.__all__ if name.islower()]
    n, ready = 1000, {keep.mass: keep.mass("span"), keep.at: keep.at(-1)}
    rows = []
    for kind in kinds:
        made = ready.get(kind) or kind()
        axes = f"b l {'g' if kind in (keep.k, keep.v) else 'h'} {made.axes}"
        wide = made.width(n, n)
        cost = f"{wide:,} x head dim" if made.kind == "stream" else f"{wide:,}"
        rows.append(f"| `{made!r}` | `[{axes}]` | {cost} | {prose(card(kind).sentence)} |")
    table = [
        "| keep | result | numbers | what it is |",
        "|---|---|---|---|",
        *rows,
    ]
    lead = (
        f"Numbers are those held for each prompt of {n:,} tokens, each layer and each head, all queries read; the whole"
        f" pattern has {n * n:,}. `capture(...).cost(batch, length)` says the bytes before they are paid."
    )
    found = [Method(f"keep.{kind.__name__}", kind) for kind in kinds]
    return "\n\n".join(["# Keeps", lead, "\n".join(table), *map(entry, found)]) + "\n"


def reference_page(title: str, found: list[Method]) -> str:
    """Signatures with docstrings as they stand in the code."""
    return "\n\n".join([f"# {title}", *map(entry, found)]) + "\n"


def entry(method: Method) -> str:
    """One function or class, with the public methods of a class."""
    text = inspect.getdoc(method.thing) or ""
    sentence, _, rest = text.partition("\n\n")
    parts = [f"## {method.shown}", signature(method), prose(" ".join(sentence.split()))]
    if rest.strip():
        parts.append(preformatted(flowed(rest)))
    for name, member in vars(method.thing).items() if inspect.isclass(method.thing) else ():
        function = getattr(method.thing, name, None)
        if name.startswith("_") or isinstance(member, property) or not callable(function) or not function.__doc__:
            continue
        if "overload" not in name and inspect.isroutine(function):
            said = " ".join(inspect.getdoc(function).partition("\n\n")[0].split())  # type: ignore[union-attr]
            parts += [f"### {name}", signature(Method(f"{method.name}.{name}", function)), prose(said)]
    return "\n\n".join(parts)


def errors_page() -> str:
    """The errors that interp raises on purpose."""
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    rows = [f"| `{kind.__name__}` | {prose(' '.join((inspect.getdoc(kind) or '').split()))} |" for kind in kinds]
    lead = (
        "Every error is one sentence: what was given, what was expected, what to do. All are an `interp.InterpError`; "
        "on the command line they end with exit code 2. For symptoms and causes see "
        "[troubleshooting](../troubleshooting.md)."
    )
    return "\n\n".join(["# Errors", lead, "\n".join(["| error | raised for |", "|---|---|", *rows])]) + "\n"


def cli_page() -> str:
    """Every command with its options, from the application itself."""
    group: Any = typer.main.get_command(cli.app)
    parts = [
        "# Command line",
        prose(group.help),
        "MODEL is a hub name, a folder with safetensors, a `.gguf` file, or `demo`. Exit codes: 0, 2 for a wrong input "
        "(one sentence says which), 130 after Ctrl-C, 1 for anything else; `interp doctor` ends with 1 where a check "
        "failed. `INTERP_TRACEBACK=1` shows the traceback of an error that nobody foresaw.",
    ]
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([f"interp {name}", *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
        rows = [option_row(p) for p in command.params]
        table = ["| option | meaning | default |", "|---|---|---|", *rows]
        parts += [f"## interp {name}", prose(" ".join(command.help.split())), preformatted(usage), "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def option_row(param: Any) -> str:
    """One argument or option as a row of its command's table."""
    named = param.param_type_name == "argument"
    flags = [param.metavar or param.name.upper()] if named else [*param.opts, *param.secondary_opts]
    shown = ", ".join(f"`{flag}`{{.flag}}" for flag in flags).replace("|", "\\|")
    said = prose(param.help or "")
    default = param.default
    if isinstance(default, Enum):
        said += f" One of {', '.join(str(choice.value) for choice in type(default))}."
        default = default.value
    if param.required:
        told = "required"
    elif default is None or default is False or default == "" or callable(default):
        told = ""
    else:
        told = f"`{str(default).lower() if default is True else default}`"
    return f"| {shown} | {said} | {told} |"


def notebooks_page() -> str:
    """Title and first paragraph of each notebook."""
    parts = [
        "# Notebooks",
        "Each is a script in percent format and the same notebook with its outputs, in `notebooks/`; all run in CI on "
        "the demo model, and the last cell of each asserts its conclusion.",
    ]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.py")):
        cells = [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "markdown"]
        title, _, rest = (cells[0] if cells else path.stem).partition("\n")
        first = rest.strip().partition("\n\n")[0]
        parts += [f"## {title.lstrip('# ')}", " ".join(first.split()), f"`notebooks/{path.name}`"]
    return "\n\n".join(part for part in parts if part) + "\n"


def signature(method: Method) -> str:
    """How it is called, as python: a function as it stands in the code, a class by its settings."""
    thing = inspect.unwrap(method.thing)
    if inspect.isclass(thing):
        return f"```py\n{called(method.shown, inspect.signature(thing))}\n```"
    source = textwrap.dedent(inspect.getsource(thing))
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"{method.shown} is neither a function nor a class")
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    text = "\n".join(lines).replace(f"def {node.name}", method.shown, 1)
    # what a method is called on is not given
    text = re.sub(r"\((\n +)?(?:self|cls)(?:,\s*|(?=\)))", r"(\1", text, count=1)
    return f"```py\n{text.rpartition(':')[0]}\n```"


def called(name: str, given: inspect.Signature) -> str:
    shown, keywords = [], False
    for parameter in given.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            shown.append("*")
        keywords = keywords or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        shown.append(re.sub(r"\b(?:\w+\.)+([A-Za-z]\w*)", r"\1", str(parameter)))
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= LINE else "\n".join([f"{name}(", *(f"    {part}," for part in shown), ")"])


def preformatted(text: str) -> str:
    """Text as it is, in lines that fit; what continues a line is indented as that line is."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, LINE, subsequent_indent=indent) or [""]
    return "\n".join(["```text", *lines, "```"])


def flowed(text: str) -> str:
    """A docstring with each paragraph in one line: lines that were broken at the width of the file are joined."""
    lines: list[str] = []
    full = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        begins = not line.strip() or _ITEM.match(line.strip())
        if full and not begins and indent >= len(lines[-1]) - len(lines[-1].lstrip()):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
        # shorter lines ended by themselves: the code is 120 wide, and docstrings stand 4 or 8 in
        full = len(line) > FULL
    return "\n".join(lines)


def prose(text: str) -> str:
    """Text of a docstring as Markdown: nothing in it is markup but `code`, and papers are links."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    text = re.sub(r"([\\*_{}\[\]#|~^])", r"\\\1", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here into the navigation."""
    made = pages()
    config.nav = [_expanded(item, made) for item in config.nav or []]
    config.extra["made"] = made
    return config


def _expanded(item: Any, made: dict[str, str]) -> Any:
    if isinstance(item, list):
        return [_expanded(part, made) for part in item]
    if isinstance(item, dict):
        return {title: _expanded(part, made) for title, part in item.items()}
    if item.endswith("/"):
        return [{Path(path).stem: path} for path in made if path.startswith(item)]
    return item


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, text in config.extra.pop("made").items():
        files.append(File.generated(config, path, content=text))
    return files


def last_words() -> str:
    """What each method cannot show, as a table."""
    rows = [
        f"| `{method.shown}` | {prose(capital(card(method.thing).cannot_show))} |"
        for found in methods().values()
        for method in found
    ]
    return "\n".join(["| method | cannot show |", "|---|---|", *rows])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`identify.retrieval` and its like lead to their pages, wherever they stand in a sentence or a table."""
    if page.file.generated_by:
        return markdown
    markdown = markdown.replace(LAST_WORDS, last_words())
    up = "../" * page.file.src_uri.count("/")
    known = {method.shown: f"{up}{folder}/{method.name}.md" for folder, found in methods().items() for method in found}

    def link(match: re.Match[str]) -> str:
        name = re.split(r"[( ]", match[1])[0]
        return f"[`{match[1]}`]({known[name]})" if name in known else match[0]

    parts = re.split(r"(^```.*?^```|^#.*?$)", markdown, flags=re.M | re.S)
    return "".join(
        part if part.startswith(("```", "#")) else re.sub(r"(?<!\[)`([^`\n]+)`", link, part) for part in parts
    )
