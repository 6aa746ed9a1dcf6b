"""Which operations are right in which state of a model, and which are refused by a sentence.

    python -m benchmarks.model_states [--states lora bnb4] [--out docs/model_states.json]

Needs peft, bitsandbytes, torchao and optimum-quanto; a state whose package is missing is left out and named. The model
is small, with random weights. Each operation is compared with a reference that does not use interp: eager attention, a
hook of this script, or an added mask.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import interp
from interp import keep
from interp.analyses.prompt_sizes import PromptSizes
from interp.errors import InterpError
from interp.report import make_report
from interp.runs.plan import ScorePlan
from interp.runs.run import Run

SIZES = PromptSizes(
    n_needles=2, needle_length=600, needle_depths=(0.5,), reply_tokens=3, n_texts=2, text_length=40, n_repeated=10,
    n_check_needles=2, check_length=600, explorer_tokens=64,
)  # fmt: skip
TEXTS = ("One head reads, the other writes.", "The answer is 4711")
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 5e-3}


def tokenizer() -> Any:
    """A tokenizer of bytes."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )


def plain(**settings: Any) -> Any:
    """A model of two layers and four heads with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | settings)).eval()


def lora() -> Any:
    """The plain model with an active adapter."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(plain(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"], r=2)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def merged() -> Any:
    """The adapter merged into the weights, inside of the model of peft."""
    model = lora()
    model.merge_adapter()
    return model


def bnb(**settings: Any) -> Any:
    """The plain model, loaded in a form of bitsandbytes."""
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        plain().save_pretrained(folder)
        config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
        return LlamaForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=config).eval()


def torchao() -> Any:
    """The plain model with int8 weights of torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    model = plain()
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quanto() -> Any:
    """The plain model with int8 weights of optimum-quanto."""
    from optimum.quanto import freeze, qint8, quantize  # pyright: ignore[reportMissingImports]

    model = plain()
    quantize(model, weights=qint8)
    freeze(model)
    return model.eval()


def cpu_offloaded() -> Any:
    """The plain model, whose weights accelerate brings to a layer when it runs."""
    from accelerate import cpu_offload

    return cpu_offload(plain(), execution_device=torch.device("cpu"))


def disk_offloaded() -> Any:
    """The plain model with its weights on disk."""
    from accelerate import disk_offload

    return disk_offload(plain(), tempfile.mkdtemp(), execution_device=torch.device("cpu"))


def checkpointing() -> Any:
    """The plain model in training mode of its checkpoints, as one calls it before fine-tuning."""
    model = plain()
    model.gradient_checkpointing_enable()
    return model


STATES: dict[str, tuple[str, Callable[[], Any]]] = {
    "plain": ("", plain),
    "lora": ("peft", lora),
    "lora merged": ("peft", merged),
    "bnb4": ("bitsandbytes", lambda: bnb(load_in_4bit=True)),
    "bnb8": ("bitsandbytes", lambda: bnb(load_in_8bit=True)),
    "torchao int8": ("torchao", torchao),
    "quanto int8": ("optimum.quanto", quanto),
    "cpu offload": ("accelerate", cpu_offloaded),
    "disk offload": ("accelerate", disk_offloaded),
    "compiled": ("", lambda: torch.compile(plain(), backend="aot_eager")),
    "bf16": ("", lambda: plain().to(torch.bfloat16)),
    "fp16": ("", lambda: plain().to(torch.float16)),
    "autocast": ("", plain),
    "tied weights": ("", lambda: plain(tie_word_embeddings=True)),
    "checkpointing": ("", checkpointing),
}
"""state -> package that it needs, and the function that makes the model"""


class Wrong(Exception):
    """An operation whose numbers are not those of the reference."""


def _inner(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    off = (found.float() - wanted.float()).abs().max().item()
    if not off <= tolerance * max(1.0, wanted.float().abs().max().item()):
        raise Wrong(f"off by {off:.2g}")


@contextlib.contextmanager
def _eager(model: Any) -> Any:
    inner = _inner(model)
    inner.set_attn_implementation("eager")
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")


class Operations:
    """The operations on one model.

    Args:
        model: The model.
        tolerance: Largest difference, relative to the largest number.
    """

    def __init__(self, model: Any, tolerance: float) -> None:
        self.model, self.tolerance, self.tokenizer = model, tolerance, tokenizer()
        items = [{"text": text, "spans": {"marked": text[:4]}} for text in TEXTS]
        self.prompts = interp.Prompts.encode(self.tokenizer, items)

    def logits(self, **more: Any) -> torch.Tensor:
        """float32 [b v] at the last token."""
        with torch.no_grad():
            return self.model(**self.prompts.tensors() | more).logits[:, -1].float()

    def doctor(self) -> None:
        """The checks of `interp.doctor`."""
        found = interp.doctor(self.model, self.tokenizer)
        if not found.ok:
            failed = "; ".join(line for line in str(found).splitlines() if "FAIL" in line)
            # a model that does it without interp as well is described by a true sentence
            raise InterpError(failed) if "the model does this without interp as well" in failed else Wrong(failed[:200])

    def capture(self) -> None:
        """The mass on the first token, against eager attention."""
        with torch.no_grad(), interp.capture(self.model, keep.mass(0), self.prompts) as cap:
            self.model(**self.prompts.tensors())
        with torch.no_grad(), _eager(self.model):
            patterns = self.model(**self.prompts.tensors(), output_attentions=True).attentions
        for row, prompt in enumerate(self.prompts):
            wanted = torch.stack([layer[row, :, -len(prompt) :, -len(prompt)] for layer in patterns])
            _near(cap[keep.mass(0)][row, :, :, : len(prompt), 0], wanted, self.tolerance)

    def generate(self) -> None:
        """The same reply with and without a capture."""
        given = {**self.prompts.tensors(), "max_new_tokens": 5, "do_sample": False}
        given.pop("position_ids", None)
        before = self.model.generate(**given)
        with interp.capture(self.model, keep.mass(0), self.prompts):
            after = self.model.generate(**given)
        if not torch.equal(before, after):
            raise Wrong("other tokens")

    def ablate(self) -> None:
        """Zero ablation of a head, against zeros at the input of the output projection."""
        with interp.ablate(self.model, "L1H2", "zero"):
            found = self.logits()

        def zeros(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            z = args[0].clone()
            z[..., 2 * 16 : 3 * 16] = 0
            return (z, *args[1:])

        handle = _inner(self.model).model.layers[1].self_attn.o_proj.register_forward_pre_hook(zeros)
        wanted = self.logits()
        handle.remove()
        _near(found, wanted, self.tolerance)
        if torch.equal(found, self.logits()):
            raise Wrong("nothing changed")

    def steer(self) -> None:
        """PASTA in all heads, against an added mask."""
        with interp.steering(self.model, interp.steer.Pasta("marked", alpha=0.1), self.prompts):
            found = self.logits()
        given = self.prompts.tensors()
        length = given["input_ids"].shape[1]
        mask = torch.full((len(self.prompts), 1, length, length), torch.finfo(torch.float32).min)
        for row, prompt in enumerate(self.prompts):
            pad = length - len(prompt)
            allowed = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
            bias = torch.full((len(prompt),), 0.1).log()
            start, stop = prompt.spans["marked"][0]
            bias[start:stop] = 0.0
            mask[row, 0, pad:, pad:] = torch.where(allowed, bias, torch.finfo(torch.float32).min)
        dtype = next(_inner(self.model).parameters()).dtype
        mask = mask.to(dtype if dtype.is_floating_point else torch.float32)
        _near(found, self.logits(attention_mask=mask), self.tolerance)
        if torch.equal(found, self.logits()):
            raise Wrong("nothing changed")

    def retrieval(self) -> None:
        """Retrieval scores, on the needles of a run."""
        needles = interp.tasks.needle(self.tokenizer, n=2, lengths=(600,))
        scores = interp.identify.retrieval(self.model, needles, max_new_tokens=3, recall=-1.0)
        if not scores.values.isfinite().all():
            raise Wrong("scores that are not finite")

    def sweep(self) -> None:
        """The effect of single heads in a sweep, against single ablations."""
        swept = interp.sweep(self.model, self.prompts, "zero", lambda logits, batch: logits[:, 7])
        with interp.ablate(self.model, "L1H2", "zero"):
            wanted = self.logits()[:, 7]
        _near(swept.per_prompt[:, 1, 2], wanted, self.tolerance)

    def importance(self) -> None:
        """Gradient importance, which is finite and not zero everywhere."""
        scores = interp.identify.gradient_importance(self.model, self.prompts)
        if not scores.values.isfinite().all() or not scores.values.any():
            raise Wrong("scores that are not finite, or all zero")

    def run(self) -> None:
        """A run of two analyses with their tests, and its report."""
        with tempfile.TemporaryDirectory() as folder:
            plan = ScorePlan(analyses=("sinks", "induction"), sizes=SIZES, n_heads=2, n_random_sets=2, batch_size=2)
            results = Run.open(Path(folder) / "run", plan, self.model, self.tokenizer).finish(progress=False)
            make_report(results, Path(folder) / "report.html")


NAMES = ("doctor", "capture", "generate", "ablate", "steer", "retrieval", "sweep", "importance", "run")


def cells(state: str) -> dict[str, str]:
    """Operation -> "right", "refused: SENTENCE" or "WRONG: REASON", in one state.

    Args:
        state: One of `STATES`.
    """
    found: dict[str, str] = {}
    for name in NAMES:
        # each operation has a model of its own, so that none inherits a change
        model = STATES[state][1]()
        dtype = next(_inner(model).parameters()).dtype
        tolerance = 3e-2 if state in ("autocast", "bnb8") else TOLERANCE.get(dtype, 2e-3)
        inside = torch.autocast("cpu", torch.bfloat16) if state == "autocast" else contextlib.nullcontext()
        try:
            with inside:
                getattr(Operations(model, tolerance), name)()
            found[name] = "right"
        except InterpError as error:
            found[name] = f"refused: {error}"
        except Wrong as error:
            found[name] = f"WRONG: {error}"
        except Exception as error:
            found[name] = f"WRONG: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return found


def main() -> None:
    """Print the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--out", help="JSON file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, str]] = {}
    print(f"| state | {' | '.join(NAMES)} |\n|{'---|' * (len(NAMES) + 1)}")
    for state in given.states:
        package = STATES[state][0]
        if package and importlib.util.find_spec(package.split(".")[0]) is None:
            print(f"| {state} | needs {package} |")
            continue
        found[state] = cells(state)
        print(f"| {state} | {' | '.join(cell.split(':')[0] for cell in found[state].values())} |", flush=True)
    for state, row in found.items():
        for name, cell in row.items():
            if cell != "right":
                print(f"- {state}, {name}: {cell}")
    if given.out:
        Path(given.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
