"""Small tokenizers built offline: byte-level with and without trimmed offsets, byte fallback, and whole words."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)
MERGES = [
    ("Ġ", "Ġ"), ("ĠĠ", "Ġ"), ("Ċ", "ĠĠ"), ("Ġ", "P"), ("ĠP", "a"), ("r", "i"), ("ri", "s"), ("ĠPa", "ris"),
    ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "in"), ("Ġ", "ð"),
]  # fmt: skip


def byte_level(*, trim: bool = False, bos: bool = False, eos: bool = False, chat: bool = True, pad: bool = False):
    """BPE over bytes, as GPT-2 and Llama 3; trim cuts spaces off the offsets, as Llama 3 does."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2}
    for symbol in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]:
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    template = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), template])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {})
    )
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def byte_fallback():
    """Characters with bytes for the rest and "▁" for a space, as Llama 2."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for symbol in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeinrsPt"]:
        vocab[symbol] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words():
    """Whole words, with the spaces between them dropped."""
    vocab = {"<unk>": 0, "the": 1, "cat": 2, "sat": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
