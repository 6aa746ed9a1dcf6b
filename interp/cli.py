"""The command line: list, doctor, score, steer, safety, report, show."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import interp
from interp.cli_options import AsJson, Bos, Device, Dtype, MaxLength, Model, Out, from_options, with_options
from interp.errors import InterpError, PromptError, RunError, UsageError
from interp.hooks.limits import refusing

app = typer.Typer(
    name="interp",
    help="Find the attention heads that matter, test whether they do, and steer them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
EXIT_INTERRUPTED = 130
"""exit code after Ctrl-C, as in shells"""
N_TOP_HEADS = 10
TRACEBACK = "set INTERP_TRACEBACK=1 to see where"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"interp {interp.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_entries(
    name: Annotated[
        str,
        typer.Argument(
            help='Name of an analysis, edit, selector or task, or the word "tasks" for a list of all tasks.'
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List analyses, edits, key selectors and tasks, or print the documentation and settings of one."""
    from interp.cli_list import card, card_data, table, table_data

    if name:
        _echo(json.dumps(card_data(name), indent=1) if as_json else card(name))
    else:
        _echo(json.dumps(table_data(), indent=1) if as_json else table())


@app.command()
def doctor(model: Model, as_json: AsJson = False, device: Device = None, dtype: Dtype = None) -> None:
    """Check which features work for a model, and report why others do not."""
    loaded = interp.load(model, device=device, dtype=dtype)
    found = interp.doctor(loaded.model, loaded.tokenizer)
    _echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if not found.ok:
        raise typer.Exit(1)


@app.command()
@with_options("interp.runs.plan:ScorePlan", "settings", "analyses")
def score(
    analyses: Annotated[
        str,
        typer.Argument(
            metavar="ANALYSES",
            help="Names separated by commas, or a set of them: basic (the five analyses of `interp report`), long "
            "(the analyses of the group `long context` that need no results of another, without needle_sweep), all "
            "(every analysis that needs no results of another, without needle_sweep and those of `interp safety`). "
            "`interp list` prints names and sets.",
        ),
    ],
    model: Model,
    out: Out,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Your own prompts in place of the standard ones, .txt or .jsonl; analyses that need pairs or "
            "other special prompts refuse them."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, as in qada.tau=0.9; may be repeated.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and stop.")] = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    bos: Bos = None,
    max_length: MaxLength = None,
    **options: Any,
) -> None:
    """Score the heads of a model, test the top heads by ablation against random heads (for some analyses, such as
    retrieval and induction), and print the results."""
    from interp.runs.estimate import estimate
    from interp.runs.plan import ScorePlan

    if analyses.strip() == "safety":
        raise UsageError("safety is a separate command; run interp safety MODEL --out DIR.")
    names = tuple(part.strip() for part in analyses.split(",") if part.strip())
    plan = from_options(ScorePlan, options, analyses=names, settings=_settings(settings or []))
    loaded, own = _load(model, prompts, device, dtype, bos, max_length, out)
    if dry_run:
        with refusing("this model cannot be run with these settings", UsageError, TRACEBACK):
            cost = estimate(plan, loaded.model, loaded.tokenizer, own)
        _echo(json.dumps(cost.to_dict(), indent=1) if as_json else str(cost))
        return
    _finish(plan, loaded, out, own, as_json)


@app.command()
@with_options("interp.runs.safety:SafetyPlan")
def safety(
    model: Model,
    out: Out,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    bos: Bos = None,
    max_length: MaxLength = None,
    **options: Any,
) -> None:
    """Find the heads that refusals depend on, and measure refusals with those heads ablated."""
    from interp.runs.safety import SafetyPlan

    # in 16 bits the rounding error of a divergence is as large as what it measures
    loaded, _ = _load(model, None, device, dtype or "float32", bos, max_length)
    _finish(from_options(SafetyPlan, options), loaded, out, None, as_json)


@app.command()
@with_options("interp.runs.steer:SteerPlan", "settings")
def steer(
    model: Model,
    out: Out,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, as in alpha=0.01 or pasta.alpha=0.01; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    bos: Bos = None,
    max_length: MaxLength = None,
    **options: Any,
) -> None:
    """Steer a model on a task: profile heads, choose how many to steer, and judge replies with and without steering."""
    from interp.analyses import registry
    from interp.runs.steer import SteerPlan

    # the canonical name, as `_settings` gives it
    method = options["method"] = registry.get(options["method"], "edit").name
    dotted = [text if "." in text.partition("=")[0] else f"{method}.{text}" for text in settings or []]
    given = _settings(dotted)
    if other := [name for name in given if name != method]:
        raise UsageError(f"--set names {other[0]!r}, but the method is {method!r}; set fields of {method}.")
    loaded, _ = _load(model, None, device, dtype, bos, max_length)
    _finish(from_options(SteerPlan, options, settings=given.get(method, {})), loaded, out, None, as_json)


@app.command()
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL|DIR]",
            help="A model, which is first scored by the five analyses of the set basic, or a run folder.",
        ),
    ] = "demo",
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    run: Annotated[
        Path | None, typer.Option(help="Run folder for a model that is scored; by default next to the output.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, random head sets and confidence intervals.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    bos: Bos = None,
    max_length: MaxLength = None,
) -> None:
    """Write one HTML file about a model or a run; it opens offline and can be shared."""
    from interp.analyses.tasks.standard import PromptSizes
    from interp.hooks.writer import check_writable
    from interp.runs.folder import is_run
    from interp.runs.plan import ScorePlan
    from interp.runs.results import read_results

    # now rather than after the run
    check_writable(output, RunError)
    folder = Path(source)
    if is_run(folder):
        with refusing(f"the run in {folder} cannot be shown", RunError, f"make it again; {TRACEBACK}"):
            page = interp.make_report(read_results(folder), output)
        _echo(str(page.resolve()))
        return
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RunError(f"{folder} is neither a run folder nor a model folder; it has no manifest.json or config.json.")
    plan = ScorePlan(sizes=PromptSizes(seed=seed))
    loaded, _ = _load(source, None, device, dtype, bos, max_length)
    own_run = output.with_name(f"{output.stem}-run") if run is None else run
    found = _opened(own_run, plan, loaded, None).finish()
    _echo(str(interp.make_report(found, output).resolve()))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A run folder or the file of a result.")],
    top: Annotated[int, typer.Option(help="Number of heads to print.")] = N_TOP_HEADS,
    model: Annotated[str | None, typer.Option(help="Check that the results belong to this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the results of a run folder, or one result."""
    from interp.analyses.results import codec
    from interp.analyses.results.result import Result
    from interp.runs.results import read_results

    if not path.exists() and not codec.json_path(path).exists():
        raise RunError(f"{path} does not exist; give a run folder or the file of a result.")
    if top < 1:
        raise UsageError(f"--top {top} is too small; give at least 1.")
    loaded = None if model is None else interp.load(model).model
    with refusing(f"{path} cannot be shown", RunError, f"make it again; {TRACEBACK}"):
        if path.is_dir():
            found = read_results(path)
            if loaded is not None:
                found.provenance.check_model(loaded)
            _print(found, top, as_json)
        else:
            one = Result.load(path, loaded)
            _echo(json.dumps(_data(one, top), indent=1) if as_json else one.summary(top))


def _echo(text: str, err: bool = False) -> None:
    """Print a text whose names may come from files of others: no character in it can act on a terminal."""
    from interp.hooks.visible import visible

    typer.echo(visible(text), err=err)


def _settings(given: list[str]) -> dict[str, dict[str, Any]]:
    """{"qada": {"tau": 0.9}} from ["qada.tau=0.9"], with the names that the registry has."""
    from interp.analyses import registry

    found: dict[str, dict[str, Any]] = {}
    for text in given:
        name, setting, value = registry.parse_setting(text)
        known = [registry.get(name, kind).name for kind in registry.kinds_of(name)]
        found.setdefault(known[0] if known else name, {})[setting] = value
    return found


def _load(
    model: str,
    prompts: Path | None,
    device: str | None,
    dtype: str | None,
    bos: bool | None,
    max_length: int | None,
    out: Path | None = None,
) -> tuple[Any, Any]:
    """The model with its tokenizer, and the user's prompts; both have the date of the run in `out`."""
    from interp.runs.date import dated

    loaded = interp.load(model, device=device, dtype=dtype, bos=bos, max_length=max_length)
    if loaded.tokenizer is None:
        raise UsageError(f"{model} has no tokenizer, which the prompts need; put its tokenizer files into the folder.")
    if out is not None:
        # own prompts have the date of the run too
        loaded = loaded._replace(tokenizer=dated(out, loaded.tokenizer))
    if prompts is None:
        return loaded, None
    with refusing(f"the prompts in {prompts} cannot be encoded", PromptError, TRACEBACK):
        return loaded, interp.Prompts.from_file(prompts, loaded.tokenizer)


def _opened(out: Path, plan: Any, loaded: Any, own: Any) -> Any:
    """The run in a folder, with all its prompts; nothing is computed yet, so an error here is one of the inputs."""
    from interp.runs.run import Run

    with refusing("this model cannot be run with these settings", UsageError, TRACEBACK):
        return Run.open(out, plan, loaded.model, loaded.tokenizer, own)


def _finish(plan: Any, loaded: Any, out: Path, own: Any, as_json: bool) -> None:
    found = _opened(out, plan, loaded, own).finish()
    _print(found, N_TOP_HEADS, as_json)
    _echo(f"{out.resolve()}", err=True)


def _print(found: Any, top: int, as_json: bool) -> None:
    if as_json:
        results = {name: _data(result, top) for name, result in found.items()}
        left = {name: {"cells": made, "of": n} for name, (made, n) in found.unfinished.items()}
        _echo(json.dumps({"results": results, "missing": found.missing, "unfinished": left}, indent=1))
    else:
        _echo(found.summary(top))


def _data(result: Any, top: int) -> Any:
    """A result as JSON can hold it: the rows of its table, the leading heads of a head table."""
    from interp.analyses.results.head_scores import HeadScores

    if isinstance(result, HeadScores):
        leading = {str(found.head): found for found in result.leading(top)}
        frame = result.to_frame().set_index("name", drop=False).loc[list(leading)]
        more = {key: [getattr(found, key) for found in leading.values()] for key in ("held_out", "top_share")}
        rows = json.loads(frame.assign(**more).to_json(orient="records"))
        about = {"unit": result.unit, "threshold": result.threshold, "counted": result.counted}
        halves = None if result.split_half != result.split_half else result.split_half
        return {**about, "split_half": halves, "top": rows}
    return json.loads(result.to_frame().to_json(orient="records"))


def main() -> None:
    """Run the command line: exit code 0, 2 for a wrong input, 130 for Ctrl-C, 1 for anything else."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except SystemExit as stop:
        code = stop.code
    except InterpError as error:
        _fail(str(error), 2)
    except Exception as error:
        # a wrong option; typer brings click's errors under a name that depends on its version
        if (message := getattr(error, "format_message", None)) is not None:
            _fail(message(), getattr(error, "exit_code", 2))
        if os.environ.get("INTERP_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (set INTERP_TRACEBACK=1 to see where).", 1)
    if code == EXIT_INTERRUPTED:
        _fail("stopped; run the same command again to continue.", EXIT_INTERRUPTED)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    _echo(f"interp: {' '.join(message.split())}", err=True)
    sys.exit(code)
