"""Every edit with settings for small prompts: for the literal rules of the papers, and for the public contract."""

from typing import Any

import torch

from interp import steer
from interp.hooks.edit.edit import Edits

HEADS = "L0H1 L0H2 L1H0 L1H3"
# of heads 16 wide, as in all families here
VECTORS = {name: torch.randn(16, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(HEADS.split())}
SLOTS = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0)) / 20
METHODS = {
    "pasta": steer.Pasta("mark", 0.05, heads=HEADS),
    "pasta, spans": steer.Pasta(["mark", "other"], 0.1, protect_first=True, heads=HEADS),
    "pasta, include": steer.Pasta("mark", 0.1, mode="include", heads=HEADS),
    "zerotuning": steer.ZeroTuning(3.0, heads=HEADS),
    "act": steer.Act(0.4, 0.08, heads=HEADS),
    "boost": steer.Boost("mark", 5.0),
    "spotlight": steer.SpotLight("mark", 0.3),
    "temperature": steer.Temperature(0.5, heads=HEADS),
    "gate": steer.Gate(0.3, heads=HEADS),
    "knockout": steer.Knockout("mark", heads=HEADS),
    "key scale": steer.KeyScale(1.4, heads=HEADS),
    "redistribute": steer.Redistribute("mark", 0.4, 0.1, 0.6, threshold=0.08, heads=HEADS),
    "redistribute, named": steer.Redistribute(["mark", "other"], 0.4, 0.1, 0.6, sinks=[0, (5, 7)], heads=HEADS),
    "middle": steer.FoundInTheMiddle(["mark", "other"], [0.02, 0.05], temperature=0.05),
    "middle, clipped": steer.FoundInTheMiddle(["other", "mark"], SLOTS, temperature=0.01, clip=0.7, heads=HEADS),
    "offset": steer.Offset(VECTORS),
    "offset, all": steer.Offset(VECTORS, at="all", scale=0.5, heads="L1"),
    "all of them": steer.KeyScale(1.4)
    + steer.Redistribute("mark", 0.4, 0.1, 0.6, sinks=0)
    + steer.FoundInTheMiddle(["mark", "other"], [0.02, 0.05], temperature=0.05)
    + steer.Offset(VECTORS)
    + steer.Gate(0.7, heads="L1"),
    "sum": steer.Pasta("mark", 0.05, heads=HEADS) + steer.SpotLight("other", 0.3) + steer.Act(0.4, 0.08, heads="L1"),
}
NO_PAPER = ("temperature", "gate", "knockout", "sum", "all of them")
IDLE = [
    steer.Pasta("mark", 1.0),
    steer.ZeroTuning(1.0),
    steer.Act(1.0),
    steer.Boost("mark", 1.0),
    steer.SpotLight("mark", 0.0),
    steer.Temperature(1.0),
    steer.Gate(1.0),
    steer.KeyScale(1.0),
    steer.Redistribute("mark", 1.0),
    steer.FoundInTheMiddle(["mark", "other"], [0.0, 0.1], clip=0.0),
    steer.Offset(VECTORS, scale=0.0),
    steer.Offset(VECTORS, heads="L0H0"),
    steer.Pasta("mark", 0.1, heads=""),
    Edits(),
]
# (an edit that acts on every head, the same edit with settings that change nothing)
CONTRACTS: dict[str, tuple[Any, Any]] = {
    "pasta": (steer.Pasta("mark", 0.05), steer.Pasta("mark", 1.0)),
    "act": (steer.Act(0.2, 0.02), steer.Act(1.0)),
    "zerotuning": (steer.ZeroTuning(4.0), steer.ZeroTuning(1.0)),
    "boost": (steer.Boost("mark", 4.0), steer.Boost("mark", 1.0)),
    "spotlight": (steer.SpotLight("mark", 0.5), steer.SpotLight("mark", 0.0)),
    "knockout": (steer.Knockout("mark"), None),
    "temperature": (steer.Temperature(0.5), steer.Temperature(1.0)),
    "gate": (steer.Gate(0.3), steer.Gate(1.0)),
    "keyscale": (steer.KeyScale(1.6), steer.KeyScale(1.0)),
    "redistribute": (steer.Redistribute("mark", 0.4, 0.0, 1.0, sinks=0), steer.Redistribute("mark", 1.0)),
    "found_in_the_middle": (steer.FoundInTheMiddle(["mark", "other"], [0.02, 0.05], temperature=0.05), None),
    "offset": (steer.Offset(VECTORS), steer.Offset(VECTORS, scale=0.0)),
}
