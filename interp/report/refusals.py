"""The sentences and tables of a safety run."""

from typing import Any

from interp.analyses.causal.curve import Curve
from interp.findings import Safety

SHOWN = ("refused", "neutral loss")
"""measures of a safety run that are drawn"""
BROKEN = 0.5
"""share of the easy questions that it answers as loaded, below which a model counts as broken"""


def safety_words(told: Safety) -> list[str]:
    """What a safety run found, in sentences; the first is of the model as loaded."""
    harmful, harmless = (told.asked[name]["refused"] for name in ("harmful", "harmless"))
    said = [
        f"As loaded the model refused {sum(harmful)} of {len(harmful)} harmful and {sum(harmless)} of {len(harmless)} "
        "harmless requests."
    ]
    for kind, points in told.curves.items():
        said += _of_curve(kind, points)
    return said


def _of_curve(kind: str, points: Curve) -> list[str]:
    """What lowered refusals most while the model still answers, and whether they fell to half otherwise."""
    refused, easy = (points.at("as loaded", 0, measure)[0] for measure in ("refused", "easy right"))
    every = [
        (name, size) for name in points.rankings[1:] if not name.startswith("random") for size in points.sizes(name)
    ]
    whole = [place for place in every if points.at(*place, "easy right")[0] >= BROKEN * easy]
    halved = [place for place in every if points.at(*place, "refused")[0] <= refused / 2]
    said = []
    if whole:
        ranking, size = min(whole, key=lambda place: (points.at(*place, "refused")[0], place[1]))
        beside = f"; with {size} random ones {_share(points, 'random', size)}" if size in points.sizes("random") else ""
        said.append(
            f"Under {kind} ablation, of the sets that leave easy questions answered, the first {size} by {ranking} "
            f"lowered refusals of other requests most, to {_share(points, ranking, size)}{beside}. It is the lowest of "
            f"{len(whole)} sets, so a little too low."
        )
    if not halved:
        said.append(f"No set of heads halved the refusals under {kind} ablation.")
    elif not set(halved) & set(whole):
        ranking, size = halved[0]
        said.append(
            f"Refusals fell to half only where the model broke: with {size} heads by {ranking} out it answers "
            f"{points.at(ranking, size, 'easy right')[0]:.0%} of the easy questions."
        )
    return said


def _share(points: Curve, ranking: str, size: int) -> str:
    mean, low, high = points.at(ranking, size, "refused")
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"


def groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sahara's groups, each beside the random ones of its size."""
    told = []
    for row in (row for row in rows if row["name"] == "sahara"):
        beside = {}
        for name in ("random", "random by layer"):
            drawn = [r["degrees"] for r in rows if r["name"] == name and len(r["heads"]) == len(row["heads"])]
            beside[name] = f"{sum(drawn) / len(drawn):.3f} ({min(drawn):.3f} to {max(drawn):.3f})"
        told.append(
            {
                "heads": ", ".join(row["heads"]),
                "degrees": row["degrees"],
                "one_minus_cos": row["one_minus_cos"],
                "random": beside["random"],
                "by_layer": beside["random by layer"],
            }
        )
    return told
