"""Cost of steering: generate() of the demo model without and with each edit, in turns.

    python -m benchmarks.steering [--length 400] [--tokens 40] [--turns 5]
    python -m benchmarks.steering --prefill 1000 4000 8100

Every method generates the same number of new tokens. Ratios are medians over turns, each to an unsteered run. With
--prefill, prompts of these lengths are read once with each edit in all heads, in seconds of processor time.
"""

import argparse
import statistics
import time
from typing import Any

import interp
from interp import steer
from interp.hooks.edit.edit import Edits, steering
from interp.hooks.read.capture import model_inputs, run

SOME = "L8-L12"
WAYS: dict[str, Any] = {
    "no edit": Edits(),
    f"PASTA, {SOME}": steer.Pasta("needle", 0.1, heads=SOME),
    "PASTA, all heads": steer.Pasta("needle", 0.1),
    "ZeroTuning, all heads": steer.ZeroTuning(2.0),
    f"ACT, {SOME}": steer.Act(0.4, 0.1, heads=SOME),
    "ACT, all heads": steer.Act(0.4, 0.1),
    "Boost, all heads": steer.Boost("needle", 4.0),
    "SpotLight, all heads": steer.SpotLight("needle", 0.2),
}


IN_ALL_HEADS: dict[str, Any] = {
    "no edit": Edits(),
    "PASTA": steer.Pasta("needle", 0.1),
    "ACT": steer.Act(),
    "ACT, beta 0": steer.Act(0.0),
    "SpotLight": steer.SpotLight("needle", 0.2),
}


def prefill(model: Any, tokenizer: Any, lengths: list[int]) -> None:
    """Print the processor time of reading one prompt of each length."""
    for length in lengths:
        prompts = interp.tasks.needle(tokenizer, lengths=(length,), n=1)
        plain = 0.0
        for name, edit in IN_ALL_HEADS.items():
            start = time.process_time()
            with steering(model, edit, prompts):
                run(model, prompts, logits_to_keep=1)
            seconds = time.process_time() - start
            plain = plain or seconds
            print(f"{prompts.lengths[0]:6d} tokens  {name:12s} {seconds:6.1f} s  {seconds / plain:5.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prefill", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    loaded: Any = interp.load("demo", device="cpu")
    model, tokenizer = loaded
    if arguments.prefill:
        prefill(model, tokenizer, arguments.prefill)
        return
    prompts = interp.tasks.needle(tokenizer, lengths=(arguments.length,), n=1)

    def seconds(edit: Any) -> float:
        start = time.perf_counter()
        with steering(model, edit, prompts):
            model.generate(
                **model_inputs(model, prompts, arguments.tokens),
                max_new_tokens=arguments.tokens,
                min_new_tokens=arguments.tokens,
                do_sample=False,
            )
        return time.perf_counter() - start

    seconds(Edits())
    print(f"{arguments.length} tokens of prompt, {arguments.tokens} new ones, {arguments.turns} turns")
    for way, edit in WAYS.items():
        pairs = [(seconds(Edits()), seconds(edit)) for _ in range(arguments.turns)]
        ratio = statistics.median(steered / plain for plain, steered in pairs)
        print(f"{way:24s} {statistics.median(s for _, s in pairs):6.2f} s  {ratio:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
