"""The command line: doctor, score, steer, report, show."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import interp
from interp.errors import InterpError, RunError, UsageError

app = typer.Typer(
    name="interp",
    help="Read, identify, steer and report the attention heads of causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MANIFESTS = ("manifest.json", "steering.json", "safety.json")
"""of a run, a steering run, a safety run"""
STOPPED = 130
"""exit code after Ctrl-C, as shells have it"""

MODEL_HELP = "Hub name, folder with safetensors, .gguf file, or demo."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; by default CUDA where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default float32 on a CPU.")]


class Kind(StrEnum):
    zero = "zero"
    uniform = "uniform"
    first = "first"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"interp {interp.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def doctor(model: Model, as_json: AsJson = False, device: Device = None, dtype: Dtype = None) -> None:
    """Say what works for a model, and why not: seam, rows, idle logits, layout, windows, sinks."""
    loaded = interp.load(model, device=device, dtype=dtype)
    found = interp.doctor(loaded.model, loaded.tokenizer)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def score(
    analyses: Annotated[
        str, typer.Argument(metavar="ANALYSES", help="Names separated by commas; all, long, every stand for several.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an unfinished run in it goes on.")],
    prompts: Annotated[Path | None, typer.Option(help="Your own prompts, .txt or .jsonl, for all analyses.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, draws and intervals.")] = 0,
    needles: Annotated[int, typer.Option(help="Prompts of retrieval.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a retrieval prompt.")] = 320,
    texts: Annotated[int, typer.Option(help="Prompts of the other analyses.")] = 12,
    pairs: Annotated[int, typer.Option(help="Pairs of prompts of patching and logit attribution.")] = 16,
    text_length: Annotated[int, typer.Option(help="Tokens of a plain text.")] = 256,
    check: Annotated[bool, typer.Option(help="Causal check: the task with heads taken out.")] = True,
    heads: Annotated[str, typer.Option(help="Heads of the causal check; by default the top retrieval heads.")] = "",
    top: Annotated[
        int, typer.Option(help="Heads that the causal check takes out; other controls at most a quarter.")
    ] = 10,
    draws: Annotated[int, typer.Option(help="Random draws per control.")] = 3,
    kind: Annotated[Kind, typer.Option(help="Ablation of the causal check.")] = Kind.zero,
    check_needles: Annotated[int, typer.Option(help="Prompts of the causal check.")] = 12,
    check_length: Annotated[int, typer.Option(help="Tokens of a prompt of the causal check.")] = 224,
    explore: Annotated[int, typer.Option(help="Tokens of the text in the report's explorer; 0 for none.")] = 1024,
    steps: Annotated[int, typer.Option(help="Of the optimisation of DuoAttention's gates.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and stop.")] = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Score heads: retrieval, induction, previous_token, duplicate_token, sinks, which are "all"; razor_induction,
    razor_echo, semantic, reasoning, qrhead, task_kv, qada, duo for long contexts ("long"); positional, lookback,
    qk_score, concept, context_entropy, tracker, function_vectors, importance, patching, path_patching, attribution,
    logit_attribution ("every"); influence, joint and vocabulary of heads that were found; key_selectors, which keys of
    a prompt they keep and what that costs, of the scores there are (in "every"); safety as interp safety."""
    from interp.studies import Plan, parse_analyses

    if analyses.strip() == "safety":
        if dry_run or heads:
            raise UsageError("safety takes neither --dry-run nor --heads here: interp safety has its own options.")
        requests = "" if prompts is None else str(prompts)
        safety(
            model,
            out,
            requests,
            draws=draws,
            seed=seed,
            batch_size=batch_size,
            as_json=as_json,
            device=device,
            dtype=dtype,
        )
        return
    plan = Plan(
        analyses=parse_analyses(analyses),
        seed=seed,
        needles=needles,
        length=length,
        texts=texts,
        pairs=pairs,
        text_length=text_length,
        check=check,
        heads=heads,
        k=top,
        draws=draws,
        kind=kind.value,
        check_needles=check_needles,
        check_length=check_length,
        explore=explore,
        steps=steps,
        batch_size=batch_size,
    )
    _finish(plan, model, out, prompts, dry_run, as_json, device, dtype)


@app.command()
def safety(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an unfinished run in it goes on.")],
    requests: Annotated[str, typer.Option(help="Your own harmful requests, a CSV file with a header.")] = "",
    column: Annotated[str | None, typer.Option(help="Its column; by default goal, prompt, input ...")] = None,
    harmful: Annotated[int, typer.Option(help="Harmful requests to ask.")] = 100,
    harmless: Annotated[int, typer.Option(help="Harmless requests to ask.")] = 50,
    scored: Annotated[int, typer.Option(help="Refused requests that heads are scored on.")] = 32,
    tested: Annotated[int, typer.Option(help="Other refused requests, for the curves.")] = 32,
    kinds: Annotated[str, typer.Option(help="Ablations: uniform, zero, or both.")] = "uniform,zero",
    group: Annotated[int, typer.Option(help="Heads of the largest Sahara group.")] = 5,
    sizes: Annotated[str, typer.Option(help="Numbers of heads taken out.")] = "1,3,5,10,20,33",
    reply: Annotated[int, typer.Option(help="New tokens of a reply.")] = 32,
    draws: Annotated[int, typer.Option(help="Random head sets per size and kind of draw.")] = 3,
    seed: Annotated[int, typer.Option(help="Of draws and intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 8,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep whole replies, not their beginnings.")] = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the heads that refusals hang on: Ships, Sahara, gradient, and refusals with those heads taken out."""
    from interp.safety import SafetyPlan, SafetyRun

    plan = SafetyPlan(
        harmful=harmful,
        harmless=harmless,
        requests=requests,
        column=column,
        scored=scored,
        tested=tested,
        kinds=tuple(part.strip() for part in kinds.split(",") if part.strip()),
        group=group,
        sizes=tuple(_number(part, "sizes") for part in sizes.split(",") if part.strip()),
        reply=reply,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
        keep_text=keep_text,
    )
    # in 16 bits the error of a divergence is as large as what it measures
    loaded, _ = _load(model, None, device, dtype or "float32")
    _tell(SafetyRun.open(out, plan, loaded.model, loaded.tokenizer).finish(), 10, as_json)
    typer.echo(f"{out.resolve()}", err=True)


@app.command()
def steer(
    model: Model,
    method: Annotated[str, typer.Option(help="pasta, act, zerotuning, boost, spotlight or temperature.")],
    task: Annotated[str, typer.Option(help="A task's name, or your own items as a .jsonl file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an unfinished run in it goes on.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the method, as alpha=0.01; several times.")
    ] = None,
    heads: Annotated[str, typer.Option(help="Heads to steer; by default they are profiled.")] = "",
    profile: Annotated[str, typer.Option(help="A profile that was made before.")] = "",
    tops: Annotated[str, typer.Option(help="Sizes of head sets that the dev split chooses from.")] = "5,10,25,50",
    profile_items: Annotated[int, typer.Option(help="Items that heads are profiled on.")] = 32,
    dev_items: Annotated[int, typer.Option(help="Items that the head set is chosen on.")] = 20,
    test_items: Annotated[int, typer.Option(help="Items whose replies are judged.")] = 40,
    draws: Annotated[int, typer.Option(help="Random draws per control.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the order of prompts, draws and intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Replies at once.")] = 8,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Steer a task: profile heads, choose how many, and judge replies as loaded, steered and with random heads."""
    from interp.steerings import SteerPlan, SteerRun

    plan = SteerPlan(
        method=method,
        task=task,
        settings=_settings(settings or []),
        heads=heads,
        profile=profile,
        tops=tuple(_number(part, "tops") for part in tops.split(",") if part.strip()),
        profile_items=profile_items,
        dev_items=dev_items,
        test_items=test_items,
        draws=draws,
        seed=seed,
        batch_size=batch_size,
    )
    loaded, _ = _load(model, None, device, dtype)
    _tell(SteerRun.open(out, plan, loaded.model, loaded.tokenizer).finish(), 10, as_json)
    typer.echo(f"{out.resolve()}", err=True)


def _settings(given: list[str]) -> dict[str, Any]:
    """{"alpha": 0.01} from ["alpha=0.01"]; what is no number, true or false stays a text."""
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"--set {text!r} is no setting: write name=value, as in alpha=0.01.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def _number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"--{name} holds {text!r}: give whole numbers, separated by commas.") from None


@app.command()
def report(
    source: Annotated[str, typer.Argument(metavar="[MODEL|DIR]", help=f"{MODEL_HELP} Or a run folder.")] = "demo",
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    run: Annotated[Path | None, typer.Option(help="Run folder; by default beside the output.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, draws and intervals.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Make one HTML report, offline and mailable, of a model or of a run folder."""
    from interp.studies import Plan

    _writable(output)
    folder = Path(source)
    if any((folder / name).is_file() for name in MANIFESTS):
        found = _found(folder)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise RunError(f"{folder} is neither a run folder nor a model folder: it has no manifest.json or config.json.")
    else:
        beside = output.with_name(f"{output.stem}-run") if run is None else run
        found = _run(Plan(seed=seed), source, beside, None, device, dtype).finish()
    typer.echo(str(interp.make_report(found, output).resolve()))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A run folder or a score file.")],
    top: Annotated[int, typer.Option(help="How many heads.")] = 10,
    model: Annotated[str | None, typer.Option(help="Check that the scores belong to this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the top heads of a run folder or a score file, and its causal check."""
    from interp.analyses.results.head_scores import HeadScores
    from interp.told import table_data, tables

    if not path.exists() and not path.with_name(f"{path.name}.json").exists():
        raise RunError(f"{path} does not exist: give a run folder or a score file.")
    loaded = None if model is None else interp.load(model).model
    if path.is_dir():
        found = _found(path)
        if loaded is not None:
            found.provenance.check_model(loaded)
        _tell(found, top, as_json)
    else:
        scores = HeadScores.load(path, loaded)
        one = {scores.name: scores}
        told = {"scores": table_data(one, top), "causal": None}
        typer.echo(json.dumps(told, indent=1) if as_json else "\n".join(tables(one, top)))


def _found(folder: Path) -> Any:
    """What a finished run in a folder found, of whatever kind it is."""
    from interp.results import findings
    from interp.safety import safety_findings
    from interp.steerings import steering_findings

    readers = dict(zip(MANIFESTS, (findings, steering_findings, safety_findings), strict=True))
    return next((read for name, read in readers.items() if (folder / name).is_file()), findings)(folder)


def _load(model: str, prompts: Path | None, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """The model with its tokenizer, and the user's prompts."""
    loaded = interp.load(model, device=device, dtype=dtype)
    if loaded.tokenizer is None:
        raise UsageError(f"{model} has no tokenizer, which the prompts need: put its tokenizer files into the folder.")
    return loaded, None if prompts is None else interp.Prompts.from_file(prompts, loaded.tokenizer)


def _run(plan: Any, model: str, out: Path, prompts: Path | None, device: str | None, dtype: str | None) -> Any:
    from interp.runs import Run

    loaded, own = _load(model, prompts, device, dtype)
    return Run.open(out, plan, loaded.model, loaded.tokenizer, own)


def _finish(
    plan: Any,
    model: str,
    out: Path,
    prompts: Path | None,
    dry_run: bool,
    as_json: bool,
    device: str | None,
    dtype: str | None,
) -> None:
    from interp.costs import estimate

    if dry_run:
        loaded, own = _load(model, prompts, device, dtype)
        cost = estimate(plan, loaded.model, loaded.tokenizer, own)
        typer.echo(json.dumps(cost.to_dict(), indent=1) if as_json else str(cost))
        return
    found = _run(plan, model, out, prompts, device, dtype).finish()
    _tell(found, 10, as_json)
    typer.echo(f"{out.resolve()}", err=True)


def _tell(found: Any, top: int, as_json: bool) -> None:
    from interp.told import data, told

    typer.echo(json.dumps(data(found, top), indent=1) if as_json else told(found, top))


def _writable(path: Path) -> None:
    """Raise RunError now rather than after the run."""
    if path.is_dir():
        raise RunError(f"{path} is a folder: name the HTML file to write.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RunError(f"{path} cannot be written: {path.parent} is not a folder you may write to; name another place.")


def main() -> None:
    """Run the command line: exit code 0, 2 for a wrong input, 130 for Ctrl-C, 1 for anything else."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        code = app(standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
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
    if code == STOPPED:
        _fail("stopped; the same command goes on where it stood.", STOPPED)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"interp: {' '.join(message.split())}", err=True)
    sys.exit(code)
