"""A package of somebody else: one analysis, one edit and one key selector, joined to interp by entry points alone."""

from pathlib import Path

ANALYSIS = '''"""Second-copy heads: heads that look from the second copy of a text to the first."""

import torch

from interp.analyses.causal import controls
from interp.analyses.registry import analysis
from interp.analyses.results.head_scores import HeadScores
from interp.analyses.tasks import standard
from interp.hooks.model.heads import HeadLayout
from interp.hooks.model.provenance import Provenance
from interp.hooks.read.capture import read
from interp.hooks.read.keep import mass


@analysis(title="Second copy", group="plug-in", prompts=standard.repeated(), control=controls.loss(), sets=("mine",))
def second_copy(model, prompts, *, scale: float = 1.0, batch_size=8, seed=0, progress=False) -> HeadScores:
    """Score each head by its attention from the second copy of a text to the first.

    Args:
        scale: Number that scores are multiplied by.

    Source:
        A test of plug-ins.

    Limits:
        Does not show that the head copies anything.
    """
    keep = mass("first")
    found = read(model, prompts, keep, queries="second", batch_size=batch_size)
    parts = [scale * captured[keep][..., 0].nanmean(-1) for _, captured in found]
    return HeadScores(
        name="second_copy", per_prompt=torch.cat(parts), unit="share of attention",
        kv_heads=HeadLayout.of(model).kv_heads, settings={"scale": scale},
        provenance=Provenance.of(model, prompts.tokenizer, seed=seed), seed=seed,
    )
'''
EDIT = '''"""Attention to the opening of a prompt."""

import math
from dataclasses import dataclass

from interp.analyses.registry import edit
from interp.hooks.edit.edit import Edit, EditContext, check_positive
from interp.kernels.contract import Call


@edit(title="Opening")
@dataclass(frozen=True)
class Opening(Edit):
    """Multiply attention to the first n tokens of the prompt by a factor and renormalize.

    Args:
        n: Number of tokens.
        factor: Factor above 0; 1 changes nothing.

    Source:
        A test of plug-ins.

    Limits:
        Does not show what the opening is read for.
    """

    n: int = 4
    factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("factor", self.factor)

    @property
    def is_noop(self) -> bool:
        return self.factor == 1

    def apply(self, here: EditContext) -> Call:
        return here.add_key_bias(math.log(self.factor), (here.key_position >= 0) & (here.key_position < self.n))
'''
SELECTOR = '''"""Keys spread evenly over the prompt."""

from dataclasses import dataclass

from interp.analyses.kv.selector import KeySelector
from interp.analyses.registry import selector
from interp.hooks.edit.edit import EditContext


@selector(title="Every other key")
@dataclass(frozen=True)
class EveryOther(KeySelector):
    """Keep keys at even positions before keys at odd ones.

    Args:
        stride: Distance of the keys that are kept first.

    Source:
        A test of plug-ins.

    Limits:
        Does not look at attention.
    """

    stride: int = 2

    def rank(self, here: EditContext):
        return (here.key_position % self.stride == 0).float()[:, None].expand(-1, here.call.sizes[2], -1)
'''
ENTRY_POINTS = """[interp.analyses]
second_copy = plug.second_copy:second_copy
[interp.edits]
opening = plug.opening:Opening
[interp.selectors]
everyother = plug.every_other:EveryOther
"""
MODULES = {"second_copy": ANALYSIS, "opening": EDIT, "every_other": SELECTOR}


def install(folder: Path) -> Path:
    """Write the package and its metadata as pip would install them; the folder goes onto PYTHONPATH."""
    package, about = folder / "plug", folder / "plug-0.1.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text('"""A package of somebody else."""\n')
    for name, text in MODULES.items():
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder
