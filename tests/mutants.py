"""Plant known bugs one at a time and report which of them the tests catch: `python tests/mutants.py [WORD...]`.

With words, only mutants whose name or file holds one of them are planted. They are planted in a copy of the clone,
which stays as it is. The list is run by hand: a mutant takes from a few seconds to a minute.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT = 600
"""seconds that the tests of one mutant may take"""


@dataclass(frozen=True)
class Mutant:
    """A bug that changes numbers without an error."""

    name: str
    """What is wrong with it."""
    file: str
    before: str
    """A text that occurs once in the file."""
    after: str
    tests: tuple[str, ...]
    """Arguments of pytest for the tests that have to catch it."""


MUTANTS = [
    Mutant(
        "the first generated key counts as a key of the prompt",
        "interp/hooks/edit/edit_context.py",
        "inside = position < self.length[:, None]",
        "inside = position <= self.length[:, None]",
        ("tests/analyses/steer/test_scopes.py",),
    ),
    Mutant(
        "the last key of the prompt counts as a generated one",
        "interp/hooks/edit/edit_context.py",
        "inside = position < self.length[:, None]",
        "inside = position < self.length[:, None] - 1",
        ("tests/analyses/steer/test_scopes.py",),
    ),
    Mutant(
        "pooling divides by the neighbours that exist",
        "interp/analyses/kv/_observation.py",
        "padding=kernel_size // 2) * inside",
        "padding=kernel_size // 2) * inside / pool(inside.float(), kernel_size, stride=1, padding=kernel_size // 2)",
        ("tests/analyses/kv/test_released_rules.py", "-k", "ranked_as"),
    ),
    Mutant(
        "pooling reaches across the border of the window",
        "interp/analyses/kv/_observation.py",
        "(position < here.length[:, None] - window)",
        "(position < here.length[:, None])",
        ("tests/analyses/kv/test_released_rules.py", "-k", "ranked_as"),
    ),
    Mutant(
        "Task-KV never swaps the last head for the nearest",
        "interp/analyses/kv/task_kv.py",
        "order[:, :count] if count < 2 else",
        "order[:, :count] if count < 99 else",
        ("tests/analyses/kv/test_head_budgets.py", "-k", "nearest"),
    ),
    Mutant(
        "Task-KV takes the nearest heads first",
        "interp/analyses/kv/task_kv.py",
        "far.argsort(dim=1, descending=True, stable=True)",
        "far.argsort(dim=1, descending=False, stable=True)",
        ("tests/analyses/kv/test_head_budgets.py", "-k", "nearest or far"),
    ),
    Mutant(
        '"5/n" takes the longest prompt of a batch',
        "interp/analyses/steer/_sinks.py",
        "return float(number) / lengths.float()",
        "return float(number) / lengths.float().amax().expand_as(lengths)",
        ("tests/analyses/steer/test_sinks.py", "-k", "equals_the_rule"),
    ),
    Mutant(
        "the loss of the first token has the other sign",
        "interp/analyses/measures/refusals.py",
        "return -logits[:, -1].float()",
        "return logits[:, -1].float()",
        ("tests/analyses/measures/test_refusals.py",),
    ),
    Mutant(
        "the loss of the first token is read before the last position",
        "interp/analyses/measures/refusals.py",
        "return -logits[:, -1].float()",
        "return -logits[:, -2].float()",
        ("tests/analyses/measures/test_refusals.py",),
    ),
    Mutant(
        "evicted keys return at the next eviction",
        "interp/hooks/edit/evicting_cache.py",
        "kept[..., :before] & self.kept, kept",
        "kept[..., :before], kept",
        ("tests/analyses/kv/test_cache.py", "-k", "do_not_return"),
    ),
    Mutant(
        "the entropy next to a learned sink is relative to the sink",
        "interp/kernels/accumulators.py",
        "        if call.sinks is not None:\n            return _entropy_of_keys(block)\n",
        "",
        ("tests/kernels/test_engines.py", "-k", "entropy"),
    ),
    Mutant(
        "the supporting heads are ranked by the slope as it is",
        "interp/analyses/identify/gradient_importance.py",
        'per_prompt=-scores.extras["signed"]',
        'per_prompt=scores.extras["signed"]',
        ("tests/analyses/identify/test_supporting.py",),
    ),
    Mutant(
        "a row of generate() ends one token late",
        "interp/hooks/model/row_ends.py",
        "torch.where(done & (before == OPEN), seen, before)",
        "torch.where(done & (before == OPEN), seen + 1, before)",
        ("tests/hooks/read/test_row_ends.py",),
    ),
    Mutant(
        "positions count the padding in the middle of a row",
        "interp/hooks/model/row_text.py",
        "return cls((live.cumsum(-1) - 1).masked_fill(~live, -1))",
        "first = live.int().argmax(-1, keepdim=True)\n"
        "        return cls((torch.arange(live.shape[-1], device=live.device) - first).masked_fill(~live, -1))",
        ("tests/hooks/read/test_row_text.py",),
    ),
    Mutant(
        "queries that a row has not chosen count in its columns",
        "interp/hooks/read/choice.py",
        "return index, None if bool(chosen[:, index].all()) else chosen",
        "return index, None",
        ("tests/hooks/read",),
    ),
    Mutant(
        "contexts act on the calls of every thread",
        "interp/hooks/model/scope.py",
        "return threading.get_ident() == self._thread and (self._task is None or self._task.done())",
        "return True",
        ("tests/hooks/model/test_scope.py",),
    ),
    Mutant(
        "a layer that is computed again is read again",
        "interp/hooks/seam.py",
        "readers = () if is_repeating() else taps",
        "readers = taps",
        ("tests/hooks/model/test_torch_state.py",),
    ),
    Mutant(
        "collected attentions are those without the edit",
        "interp/hooks/seam.py",
        "if site.call.edited and attention_names.returns_weights(module, kw):\n"
        "            weights = attention_names.weights_of(site.call, key.shape[2])",
        "if site.call.edited and attention_names.returns_weights(module, kw):\n            weights = original()[1]",
        ("tests/hooks/test_transformers_calls.py", "-k", "attentions"),
    ),
    Mutant(
        "the window of a layer does not limit the keys that ACT counts",
        "interp/analyses/steer/_sinks.py",
        "return lengths if call.window is None else lengths.clamp(max=call.window)",
        "return lengths",
        ("tests/analyses/steer/test_sinks.py", "-k", "equals_the_rule"),
    ),
    Mutant(
        "HeadKV counts the window inside of its budget",
        "interp/analyses/kv/head_kv.py",
        "forced = min(sum(self.forced), total)",
        "forced = 0.0",
        ("tests/analyses/kv/test_released_rules.py", "-k", "headkv or importance"),
    ),
]


def planted(mutant: Mutant, text: str) -> str:
    """Return the text of a file with the bug in it.

    Args:
        mutant: The bug.
        text: The text of its file.

    Raises:
        ValueError: If the text that it replaces does not occur exactly once.
    """
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: {mutant.before!r} occurs {text.count(mutant.before)} times in {mutant.file}")
    return text.replace(mutant.before, mutant.after)


def copy_of_clone(folder: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore, to a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def is_caught(mutant: Mutant, folder: Path) -> bool:
    """Whether a test fails with the bug planted in a copy of the clone; the copy is restored.

    Args:
        mutant: The bug.
        folder: The copy.

    Raises:
        RuntimeError: If no test ran, or they took too long.
    """
    path = folder / mutant.file
    text = path.read_text()
    path.write_text(planted(mutant, text))
    try:
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        done = subprocess.run(
            tests, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, timeout=TIMEOUT
        )
    finally:
        path.write_text(text)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 1


def main(words: list[str]) -> int:
    """Plant the mutants that the words choose, and print which were caught; 1 if one was not."""
    chosen = [m for m in MUTANTS if not words or any(word in m.name or word in m.file for word in words)]
    caught = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_clone(folder)
        for mutant in chosen:
            found = is_caught(mutant, folder)
            caught += found
            print(f"{'caught  ' if found else 'SURVIVES'}  {mutant.name}", flush=True)
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
