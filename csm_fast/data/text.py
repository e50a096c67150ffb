"""The Llama-3 tokenizer with Sesame's template.

``encode("Hello.", 3)`` is ``<|begin_of_text|>`` + ids of ``"[3]Hello."`` + ``<|end_of_text|>``. The vocabulary is that
of a tokenizer.json, a tokenizer.model, a hub repository, or Meta's llama-models package.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from csm_fast.system import hub
from csm_fast.system.errors import InputError

BEGIN, END = 128_000, 128_001
BEGIN_TOKEN, END_TOKEN = "<|begin_of_text|>", "<|end_of_text|>"
NO_SPEAKER = -1  # speaker of a turn whose text has no "[speaker]" prefix
DEFAULT_REPOSITORY = "sesame/csm-1b"

_SPECIAL_TOKENS = 256
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PROBE = (
    "[7]Hello, world! It's 12,345 o'clock; isn't that 3.14159?  Grüße aus Köln, ça va, ¿qué tal?\n"
    "Здравствуй, мир. こんにちは世界。你好，世界！ 안녕하세요 مرحبا بالعالم नमस्ते สวัสดี שלום "
    "\U0001f469\u200d\U0001f680 e\u0301 <|end_of_text|>"
)
_FILE, _HUB_SECONDS = "tokenizer.json", 6.0
_WAYS_OUT = (
    "give --tokenizer FILE (a tokenizer.json or tokenizer.model of Llama-3), or pip install llama-models, "
    "or connect to the hub with access to sesame/csm-1b"
)


class TextTokenizer:
    """Text and speaker -> ids, with the ids of Llama-3.

    Attributes:
        name: where the vocabulary was found, for printing.
        vocab_size: 128,256 for Llama-3.
        fingerprint: SHA-256 (64 hex digits) of the vocabulary's size and the ids of a fixed multilingual text. It is
            the same for one vocabulary in any file format, so that token stores can be compared.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ):
        """``encode`` returns the ids of a plain string, never a special id; ``decode`` is its inverse."""
        self.name, self.vocab_size = name, vocab_size
        self._encode, self._decode = encode, decode
        identity = json.dumps([vocab_size, encode(_PROBE)])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def encode(self, text: str, speaker: int) -> list[int]:
        """``[128000] + ids(f"[{speaker}]{text}") + [128001]``; speaker -1 leaves out the prefix.

        The text never gives a special token: "<|end_of_text|>" inside it is encoded as letters.

        Raises:
            ValueError: a speaker below -1.
        """
        if speaker < NO_SPEAKER:
            raise ValueError(f"speaker {speaker}: use 0 or more, or -1 for none")
        prefix = "" if speaker == NO_SPEAKER else f"[{speaker}]"
        return [BEGIN, *self._encode(prefix + text), END]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids without special ones; bytes that are not UTF-8 become U+FFFD."""
        return self._decode([i for i in map(int, ids) if i < BEGIN])

    def __repr__(self) -> str:
        return f"TextTokenizer({self.name!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint[:12]!r})"


def load_text_tokenizer(source: str | os.PathLike[str] | None = None) -> TextTokenizer:
    """A Llama-3 tokenizer.

    Args:
        source: a tokenizer.json, a tokenizer.model, a folder that holds either, or a hub id ("sesame/csm-1b",
            "meta-llama/Llama-3.2-1B"). None takes the first there is of: sesame/csm-1b in the hub cache, Meta's
            installed llama-models package, sesame/csm-1b from the hub. The network is asked last, not at all under
            HF_HUB_OFFLINE, and an unreachable hub costs seconds.

    Raises:
        InputError: nothing found, or a tokenizer that is not Llama-3's.
    """
    if source is not None:
        return _from_source(os.path.expanduser(os.fspath(source)))
    cached = hub.cached_file(DEFAULT_REPOSITORY, _FILE)
    if cached is not None:
        return _from_json(str(cached), DEFAULT_REPOSITORY)
    package = _llama_models_file()
    if package is not None:
        return _from_model(package, "llama-models package")
    try:
        return _from_json(_download(DEFAULT_REPOSITORY), DEFAULT_REPOSITORY)
    except InputError as error:
        raise InputError(f"no text tokenizer: {error.what}", mend=_WAYS_OUT) from None


def _from_source(source: str) -> TextTokenizer:
    if os.path.isdir(source):
        for name in ("tokenizer.json", "tokenizer.model", os.path.join("original", "tokenizer.model")):
            if os.path.isfile(os.path.join(source, name)):
                return _from_source(os.path.join(source, name))
        raise InputError("holds no tokenizer.json and no tokenizer.model", file=source, mend=_WAYS_OUT)
    if os.path.isfile(source):
        if source.endswith(".json"):
            return _from_json(source, source)
        if source.endswith(".model"):
            return _from_model(source, source)
        raise InputError("is no text tokenizer", file=source, mend="give a tokenizer.json or a tokenizer.model")
    if not hub.is_hub_id(source) or source.endswith((".json", ".model")):
        raise InputError(
            "no such text tokenizer", file=source, mend="give a file, a folder or a hub id like owner/name"
        )
    return _from_json(str(hub.cached_file(source, _FILE) or _download(source)), source)


def _from_json(path: str, name: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises bare Exception
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"is not a readable tokenizer.json ({first})", file=path, mend="download it again") from None
    for token, wanted in ((BEGIN_TOKEN, BEGIN), (END_TOKEN, END)):
        if tokenizer.token_to_id(token) != wanted:
            what = f"is not Llama-3's tokenizer: {token} has id {tokenizer.token_to_id(token)}, not {wanted}"
            raise InputError(what, file=path, mend="take the one of sesame/csm-1b or Llama-3.2-1B")
    tokenizer.encode_special_tokens = True  # "<|end_of_text|>" in a transcript stays text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(name, tokenizer.get_vocab_size(), partial(_encode_json, tokenizer), tokenizer.decode)


def _encode_json(tokenizer: Any, text: str) -> list[int]:
    # add_special_tokens=False: the file's own template would add a second <|begin_of_text|>.
    return tokenizer.encode(text, add_special_tokens=False).ids


def _from_model(path: str, name: str) -> TextTokenizer:
    import tiktoken

    # Not by tiktoken's loader: it keeps a copy in the temporary folder under a hash of the path, and uses the copy even
    # if the file changes.
    ranks: dict[bytes, int] = {}
    try:
        with open(path, "rb") as stream:
            for line in stream:
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path, mend="check the path") from None
    except ValueError:
        what = "is not a Llama-3 tokenizer.model (lines of base64 and rank)"
        mend = "SentencePiece models are Llama-2's; take the tokenizer of sesame/csm-1b or Llama-3.2-1B"
        raise InputError(what, file=path, mend=mend) from None
    if len(ranks) != BEGIN or sorted(ranks.values()) != list(range(BEGIN)):
        what = f"is not Llama-3's tokenizer: it has {len(ranks):,} ranks, not {BEGIN:,}"
        raise InputError(what, file=path, mend="take the one of sesame/csm-1b or Llama-3.2-1B")
    encoding = tiktoken.Encoding("llama-3", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return TextTokenizer(name, BEGIN + _SPECIAL_TOKENS, encoding.encode_ordinary, encoding.decode)


def _llama_models_file() -> str | None:
    """Llama-3's vocabulary in Meta's package, found without importing the package, which is slow."""
    spec = importlib.util.find_spec("llama_models")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, "llama3", "tokenizer.model")
        if os.path.isfile(path):
            return path
    return None


def _download(repository: str) -> str:
    """tokenizer.json of a hub repository. Raises InputError, within seconds if the hub does not answer."""
    ways = f"check the id and the connection; or {_WAYS_OUT}"
    if hub.is_offline():
        what = f"{repository} is not in the hub cache, and HF_HUB_OFFLINE forbids fetching it"
        raise InputError(what, mend=f"unset it, or {_WAYS_OUT}")
    if not hub.hub_answers(_HUB_SECONDS):
        raise InputError(f"{repository} is not in the hub cache, and {hub.endpoint()} does not answer", mend=ways)
    try:
        return str(hub.download_file(repository, _FILE))
    except hub.HubError as error:
        terms = f"accept its terms at {hub.endpoint()}/{repository} and run `hf auth login`; or {_WAYS_OUT}"
        first = error.reason.splitlines()[0][:120] if error.reason else error.error_type
        what, mend = {
            "gated": (f"access to {repository} is not granted", terms),
            "repository": (f"no repository {repository} on the hub (or it is private)", ways),
            "file": (f"{repository} holds no {_FILE}", _WAYS_OUT),
            "other": (f"{repository} could not be fetched ({first})", ways),
        }[error.kind]
        raise InputError(what, mend=mend) from None
