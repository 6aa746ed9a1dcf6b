"""A model split over two GPUs gives the numbers of the same model on one GPU, on padded batches.

    python -m benchmarks.two_gpus [--cpu]

Every kind of keep, ablation and edit, generation, retrieval, a sweep and gradient importance are compared. `--cpu`
compares a model with itself, to try the script. Exit code 1 where a result differs or an operation fails.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp import keep

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
LENGTHS = (23, 17, 30)
KEEPS = {
    "mass": keep.mass(0), "mass by value": keep.mass(0, by_value=True), "top keys": keep.top_keys(3),
    "entropy": keep.entropy(), "lse": keep.lse(), "columns": keep.columns("sum"), "pattern": keep.pattern(),
    "blocks": keep.blocks(8), "z": keep.z(), "q": keep.q(), "k": keep.k(), "v": keep.v(),
}  # fmt: skip


def model(split: bool, cpu: bool) -> Any:
    """Four layers of random weights, on one GPU or on two."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    made = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if cpu or not split:
        network: Any = made
        return network if cpu else network.cuda()
    from accelerate import dispatch_model

    places: dict[str, Any] = {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    places |= {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return dispatch_model(made, places)


def prompts() -> Any:
    """Random tokens with the spans that edits name, of three lengths."""
    rng = torch.Generator().manual_seed(1)
    ids = [[1, *torch.randint(3, 128, (n - 1,), generator=rng).tolist()] for n in LENGTHS]
    spans = [{"mark": (2, 6), "other": (8, 12), "answer": (2, 6)} for _ in ids]
    return interp.Prompts.from_ids(ids, spans=spans)


def operations() -> dict[str, Callable[[Any, Any], Any]]:
    """Name -> function of a model and prompts that returns tensors."""
    from edit_cases import METHODS

    def inputs(model: Any, batch: Any) -> Any:
        return batch.tensors(model.model.embed_tokens.weight.device)

    def logits(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs(model, batch)).logits[:, -1].float().cpu()

    def tokens(model: Any, batch: Any) -> torch.Tensor:
        given = inputs(model, batch)
        given.pop("position_ids", None)
        return model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False).cpu()

    def captured(item: Any) -> Callable[[Any, Any], Any]:
        def work(model: Any, batch: Any) -> Any:
            with torch.no_grad(), interp.capture(model, item, batch) as cap:
                model(**inputs(model, batch))
            return cap[item]

        return work

    def generated(model: Any, batch: Any) -> Any:
        with interp.capture(model, keep.mass(0), batch) as cap:
            found = tokens(model, batch)
        return found, cap[keep.mass(0)]

    def ablated(kind: Any) -> Callable[[Any, Any], Any]:
        def work(model: Any, batch: Any) -> Any:
            reference = batch if kind in ("mean", "resample") else None
            with interp.ablate(model, "L0H1 L1H0 L2H2 L3H3", kind, reference=reference):
                return logits(model, batch), tokens(model, batch)

        return work

    def steered(edit: Any) -> Callable[[Any, Any], Any]:
        def work(model: Any, batch: Any) -> Any:
            with interp.steering(model, edit, batch):
                first = logits(model, batch)
            with interp.steering(model, edit, batch):
                return first, tokens(model, batch)

        return work

    found: dict[str, Callable[[Any, Any], Any]] = {"logits": logits, "tokens": tokens, "generated": generated}
    found |= {f"keep {name}": captured(item) for name, item in KEEPS.items()}
    found |= {f"ablate {kind}": ablated(kind) for kind in ("zero", "mean", "resample", "uniform", "first")}
    found |= {f"edit {name}": steered(edit) for name, edit in METHODS.items()}
    found["retrieval"] = lambda model, batch: (
        interp.identify.retrieval(model, batch, max_new_tokens=3, recall=-1.0, form="forced").per_prompt
    )
    found["sinks"] = lambda model, batch: interp.identify.sinks(model, batch[:1]).per_prompt
    found["sweep"] = lambda model, batch: interp.sweep(model, batch, "zero").per_prompt
    found["importance"] = lambda model, batch: interp.identify.gradient_importance(model, batch).per_prompt
    found["doctor"] = lambda model, batch: torch.tensor(float(interp.doctor(model).ok))
    return found


def difference(one: Any, other: Any) -> float:
    """The largest difference, relative to the largest number."""
    if isinstance(one, tuple | list):
        return max(difference(*pair) for pair in zip(one, other, strict=True))
    one, other = one.double().cpu(), other.double().cpu()
    if not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    return float((one - other).nan_to_num().abs().max() / one.nan_to_num().abs().max().clamp(min=1.0))


def main() -> None:
    """Compare, and print one line for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="compare a model on the CPU with itself")
    given = parser.parse_args()
    # full precision, or two orders of summation would differ
    torch.backends.cuda.matmul.allow_tf32 = False
    whole, split, batch, failed = model(False, given.cpu), model(True, given.cpu), prompts(), 0
    for name, work in operations().items():
        try:
            wanted = work(whole, batch)
        except Exception as error:
            print(f"{name}: one GPU fails too: {type(error).__name__}: {str(error)[:200]}")
            continue
        try:
            off = difference(wanted, work(split, batch))
            failed += off > 1e-4
            print(f"{name}: {'equal' if off <= 1e-4 else 'DIFFERS'} ({off:.1e})")
        except Exception as error:
            failed += 1
            place = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in place if "interp" in frame.filename]
            print(
                f"{name}: FAILS: {type(error).__name__}: {str(error).splitlines()[0][:160]} at {', '.join(ours[-3:])}"
            )
    print(f"{failed} of {len(operations())} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
