"""What the command line says of results: as text, or as data for --json."""

from typing import Any

from interp.analyses.results.head_scores import HeadScores
from interp.findings import Findings


def told(found: Findings, top: int = 10) -> str:
    """The top heads of each analysis, checks, influence, key selectors, steering, refusals: as far as there are any."""
    lines = [
        f"{name}: {sum(asked['refused'])} of {len(asked['refused'])} refused as loaded"
        for safety in found.safety
        for name, asked in safety.asked.items()
    ]
    lines += tables(found.scores, top)
    if found.causal is not None:
        lines.append(f"causal check: {found.causal.k} heads ablated ({found.causal.kind}), accuracy [95% interval]")
        lines += [f"  {line}" for line in str(found.causal).splitlines()]
    for name, curve in found.controls.items():
        lines.append(f"{name}, heads zeroed: mean [95% interval]")
        lines += [f"  {line}" for line in str(curve).splitlines()]
    if found.influence is not None:
        lines.append(f"influence of {len(found.influence['heads'])} heads on documents: mean [95% interval]")
        for name, (mean, low, high) in found.influence["groups"].items():
            lines.append(f"  {name:16s} {mean:+.3f}  [{low:+.3f}, {high:+.3f}]")
    if found.keys is not None:
        lines.append(f"key selectors, mean over {', '.join(found.keys.tasks)}: tokens of the answers [95% interval]")
        lines += [f"  {line}" for line in str(found.keys).splitlines()]
    for steered in found.steering:
        if steered.tried:
            lines.append("heads steered, replies right on the dev split, and nats per token that right leads wrong by:")
        for row in steered.tried:
            margin = f"margin {row['score']:+.3f}  [{row['low']:+.3f}, {row['high']:+.3f}]"
            lines.append(f"  {row['name']:16s} {row['right']:5.0%}  {margin}")
        lines.append(f"{steered.check.kind} on {steered.task}, {steered.chosen}: accuracy [95% interval]")
        lines += [f"  {line}" for line in str(steered.check).splitlines()]
    for safety in found.safety:
        for kind, curve in safety.curves.items():
            lines.append(f"heads taken out ({kind}): mean [95% interval]")
            lines += [f"  {line}" for line in str(curve).splitlines()]
    return "\n".join(lines)


def tables(scores: dict[str, HeadScores], top: int = 10) -> list[str]:
    """Lines: the top heads of each table."""
    lines = []
    for name, table in scores.items():
        limit = "" if table.threshold is None else f", {len(table.heads())} heads above {table.threshold:g}"
        lines.append(f"{name}: {table.unit}, {table.counted} prompts counted{limit}")
        for head in table.top(top):
            row = row_of(table, head)
            interval = "" if row["low"] is None else f"  [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"  {row['head']:8s} {row['value']:.3f}{interval}")
    return lines


def data(found: Findings, top: int = 10) -> dict[str, Any]:
    """What `told` says, JSON-able."""
    causal = None if found.causal is None else found.causal.to_dict()
    made: dict[str, Any] = {"scores": table_data(found.scores, top), "causal": causal}
    if found.controls:
        made["controls"] = {name: curve.to_dict() for name, curve in found.controls.items()}
    if found.influence is not None:
        made["influence"] = found.influence
    if found.keys is not None:
        made["key_selectors"] = found.keys.to_dict() | {"rows": found.keys.rows()}
    if found.steering:
        made["steering"] = [
            {"chosen": steered.chosen, "tried": steered.tried, "check": steered.check.to_dict()}
            for steered in found.steering
        ]
    for safety in found.safety:
        made["groups"] = safety.groups
        made["curves"] = {kind: curve.to_dict() for kind, curve in safety.curves.items()}
    return made


def table_data(scores: dict[str, HeadScores], top: int = 10) -> dict[str, Any]:
    return {
        name: {
            "unit": table.unit,
            "threshold": table.threshold,
            "counted": table.counted,
            "top": [row_of(table, head) for head in table.top(top)],
        }
        for name, table in scores.items()
    }


def row_of(table: HeadScores, head: Any) -> dict[str, Any]:
    """A head, its score and its interval, None where there is none."""
    low, high = float(table.low[head]), float(table.high[head])
    known = low == low
    return {"head": str(head), "value": table[head], "low": low if known else None, "high": high if known else None}
