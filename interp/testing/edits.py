"""The contract of edits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from interp.analyses.steer.load_edits import load_edits
from interp.errors import UsageError
from interp.hooks.edit.edit import Edit, Edits, steering
from interp.hooks.model.layers import attention_layers, projection_inputs
from interp.hooks.prompts.prompts import Prompts
from interp.testing import families as models
from interp.testing.contract_error import ContractError, modules_with_hooks, require

LENGTHS = (21, 15)
N_NEW_TOKENS = 4
TOLERANCE = 1e-4
HEAD = "L0H1"


def check_edit(
    edit: Edit,
    *,
    noop: Edit | None = None,
    families: Sequence[str] = ("llama", "gpt2"),
    prompts: Prompts | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Check what must hold of any edit, on tiny models.

    - It changes the output, and only that of the heads it names. Choose settings under which it acts on every head.
    - Rows of a padded batch are what they are alone.
    - Cached generation gives the logits of a full recompute, token by token.
    - It adds up, hashes, prints, and `load_edits` reads what `save` wrote.
    - After the context, also after an error in it, logits equal those before to the bit and no hook is left.
    - `noop` says that it changes nothing, and leaves logits equal to the bit.

    Args:
        edit: The edit; one that marks spans has "mark" among them, which is a span of the default prompts.
        noop: The same edit with settings that change nothing.
        families: Model families, see `interp.testing.families`.
        prompts: Prompts in place of the default ones, with every span that the edit names.
        tolerance: Largest difference of a logit where two ways must agree.

    Raises:
        ContractError: With the family and what does not hold.

    Examples:
        >>> interp.testing.check_edit(interp.steer.Boost("mark", 4.0), noop=interp.steer.Boost("mark", 1.0))
    """
    batch = _prompts() if prompts is None else prompts
    _stored(edit)
    for family in families:
        model = models.make(family)
        before, without = _logits(model, batch), modules_with_hooks(model)
        with steering(model, edit, batch):
            edited = _logits(model, batch)
        require(float((edited - before).abs().max()) > tolerance, f"{family}: {edit} changes no logit.")
        _clean(model, batch, before, without, f"{family}: after the context")
        _rows(model, edit, batch, edited, tolerance, family)
        _decoding(model, edit, batch, tolerance, family)
        _heads(model, edit, batch, tolerance, family)
        try:
            with steering(model, edit, batch):
                raise KeyError("from within")
        except KeyError:
            pass
        _clean(model, batch, before, without, f"{family}: after an error in the context")
        if noop is not None:
            require(noop.is_noop, f"{noop} does not say that it changes nothing; define `is_noop`.")
            with steering(model, noop, batch):
                require(torch.equal(_logits(model, batch), before), f"{family}: {noop} changes logits.")


def _prompts() -> Prompts:
    """Random tokens of several lengths, with a span in the middle."""
    rng = torch.Generator().manual_seed(3)
    ids = [[1, *torch.randint(5, models.VOCAB, (n - 1,), generator=rng).tolist()] for n in LENGTHS]
    return Prompts.from_ids(ids, spans=[{"mark": (4, 8), "other": (10, 12)}] * len(ids))


@torch.no_grad()
def _logits(model: Any, prompts: Prompts) -> Tensor:
    inputs = prompts.tensors()
    mask = inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=position, use_cache=False).logits
    return torch.where(mask[..., None].bool(), logits, 0.0)


def _stored(edit: Edit) -> None:
    require(hash(edit) == hash(replace(edit)), f"{edit} does not hash by its settings; make it a frozen dataclass.")
    require(len(list(edit + edit)) == 2, f"{edit} does not add up with another.")
    with TemporaryDirectory() as folder:
        path = (Edits(()) + edit).save(Path(folder) / "edits.json")
        try:
            found = load_edits(path)
        except UsageError as error:
            raise ContractError(f"{edit} does not come back from a file ({error}); declare it with @edit.") from error
        require(found == Edits((edit,)), f"{edit} comes back from a file as {found}.")


def _clean(model: Any, prompts: Prompts, before: Tensor, hooks: list[str], when: str) -> None:
    require(torch.equal(_logits(model, prompts), before), f"{when} logits differ from those before.")
    require(modules_with_hooks(model) == hooks, f"{when} hooks are left on {', '.join(modules_with_hooks(model))}.")


def _rows(model: Any, edit: Edit, prompts: Prompts, edited: Tensor, tolerance: float, family: str) -> None:
    for row, n in enumerate(prompts.lengths):
        one = prompts[row : row + 1]
        with steering(model, edit, one):
            alone = _logits(model, one)[0]
        worst = float((alone - edited[row, -n:]).abs().max())
        require(worst <= tolerance, f"{family}: a row of a padded batch is not what it is alone, by {worst:.1e}.")


@torch.no_grad()
def _decoding(model: Any, edit: Edit, prompts: Prompts, tolerance: float, family: str) -> None:
    """Tokens that a padded batch generates with a cache, against a recompute of each row alone without one."""
    with steering(model, edit, prompts):
        out = model.generate(
            **prompts.tensors(), max_new_tokens=N_NEW_TOKENS, min_new_tokens=N_NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    width = max(prompts.lengths)
    for row, n in enumerate(prompts.lengths):
        sequence = out.sequences[row : row + 1, width - n :]
        for step, cached in enumerate(out.logits):
            with steering(model, edit, prompts[row : row + 1]):
                # the prompt first, so that the context knows where it ends
                model(sequence[:, :n], use_cache=False)
                whole = model(sequence[:, : n + step], use_cache=False).logits[0, -1]
            worst = float((cached[row] - whole).abs().max())
            require(
                worst <= tolerance,
                f"{family}: generated token {step + 1} differs between the cache and a full recompute, by {worst:.1e}.",
            )


def _heads(model: Any, edit: Edit, prompts: Prompts, tolerance: float, family: str) -> None:
    """In the first layer an edit of one head changes what it writes, and nothing that the others write."""
    if not edit.transferable:
        return
    n_heads = model.config.num_attention_heads
    one = replace(edit, heads=HEAD)
    found = []
    for edits in (Edits(()), Edits((one,))):
        seen: list[Tensor] = []

        def see(layer: int, x: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(x.detach().unflatten(-1, (n_heads, -1)).clone())

        # opened first, so that it sees the outputs after a gate
        with projection_inputs(model, [min(attention_layers(model))], see), steering(model, edits, prompts):
            _logits(model, prompts)
        found.append(seen[0])
    others = [head for head in range(n_heads) if head != 1]
    real = prompts.tensors()["attention_mask"].bool()
    differ = (found[1] - found[0])[real].abs()
    require(float(differ[:, others].max()) <= tolerance, f"{family}: an edit of {HEAD} changes what other heads write.")
    require(float(differ[:, 1].max()) > tolerance, f"{family}: an edit of {HEAD} leaves that head unchanged.")
