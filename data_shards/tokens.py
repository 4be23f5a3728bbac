"""From text to tokens and back: bytes, characters, or byte pairs (BPE), trained on text and stored beside shards."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import UserError, nearest

FILE = "tokenizer.json"
KINDS = ("byte", "character", "bpe")
BOUNDARY = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to ids and back. Its last id is the boundary between documents, which no text becomes."""

    kind: str

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many ids there are, the boundary among them."""

    @abstractmethod
    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, in the smallest whole numbers that hold the vocabulary."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of some ids; boundaries are left out."""

    @abstractmethod
    def to_json(self) -> str:
        """The text of `tokenizer.json`."""

    @property
    def boundary(self) -> int:
        """The id between documents."""
        return self.vocabulary - 1

    @property
    def dtype(self) -> np.dtype:
        """uint8, uint16 or uint32."""
        return np.min_scalar_type(self.vocabulary - 1)


class ByteTokenizer(Tokenizer):
    """A byte is a token."""

    kind = "byte"
    vocabulary = 257

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i < self.boundary)

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind}) + "\n"


class CharacterTokenizer(Tokenizer):
    """A character is a token; id 0 stands for all that were not in the text it was trained on."""

    kind = "character"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._ids = {character: number for number, character in enumerate(characters, start=1)}

    @classmethod
    def train(cls, texts: Iterable[bytes]) -> CharacterTokenizer:
        """The characters of the texts, by code point."""
        found: set[str] = set()
        for text in texts:
            found.update(text.decode(errors="replace"))
        return cls("".join(sorted(found)))

    @property
    def vocabulary(self) -> int:
        return len(self.characters) + 2

    def encode(self, text: bytes) -> np.ndarray:
        known = self._ids
        ids = [known.get(character, 0) for character in text.decode(errors="replace")]
        return np.array(ids, self.dtype)

    def decode(self, ids: Iterable[int]) -> bytes:
        letters = "\ufffd" + self.characters
        return "".join(letters[i] for i in ids if i < self.boundary).encode()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "characters": self.characters}) + "\n"


class BytePairTokenizer(Tokenizer):
    """Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019), by the library `tokenizers`."""

    kind = "bpe"

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BytePairTokenizer:
        """Merge the commonest pairs until there are `vocab_size` ids; equal texts give equal tokenizers."""
        library = _library()
        if vocab_size < 257:
            raise UserError(f"vocab_size {vocab_size}: byte pairs need at least 257 ids")
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator((text.decode(errors="replace") for text in texts), trainer)
        model.add_special_tokens([BOUNDARY])
        return cls(model)

    @property
    def vocabulary(self) -> int:
        return self.model.get_vocab_size()

    def encode(self, text: bytes) -> np.ndarray:
        encoded = self.model.encode(text.decode(errors="replace"), add_special_tokens=False)
        ids = np.array(encoded.ids, self.dtype)
        return ids[ids != self.boundary]

    def decode(self, ids: Iterable[int]) -> bytes:
        return self.model.decode([int(i) for i in ids], skip_special_tokens=True).encode()

    def to_json(self) -> str:
        return self.model.to_str(pretty=True) + "\n"


def train(kind: str, texts: Iterable[bytes], vocab_size: int | None = None) -> Tokenizer:
    """A tokenizer of this kind for these texts; `vocab_size` is for byte pairs alone."""
    if kind not in KINDS:
        raise UserError(f"tokens '{kind}'{nearest(kind, KINDS)} (use {', '.join(KINDS)})")
    if (vocab_size is None) == (kind == "bpe"):
        need = "needs" if kind == "bpe" else "has no"
        raise UserError(f"tokens '{kind}' {need} vocab_size")
    if kind == "byte":
        return ByteTokenizer()
    if vocab_size is None:
        return CharacterTokenizer.train(texts)
    return BytePairTokenizer.train(texts, vocab_size)


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer that stands beside a set of shards; without one a token is a byte."""
    path = Path(folder) / FILE
    return read(path) if path.is_file() else ByteTokenizer()


def read(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: not a tokenizer that can be read: {error}") from error


def parse(text: str, where: str) -> Tokenizer:
    """The tokenizer that a `tokenizer.json` describes; it may come from Hugging Face, if its last id is a boundary."""
    try:
        values = json.loads(text)
        kind = values.get("kind", "bpe")
        if kind == "byte":
            return ByteTokenizer()
        if kind == "character":
            return CharacterTokenizer(values["characters"])
        return _byte_pairs(_library().Tokenizer.from_str(text), where)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{where}: not a tokenizer ({error})") from error


def _byte_pairs(model: Any, where: str) -> BytePairTokenizer:
    """As it encodes whole texts: a file may also say where others cut or pad them."""
    model.no_truncation()
    model.no_padding()
    tokenizer = BytePairTokenizer(model)
    last = model.get_added_tokens_decoder().get(tokenizer.boundary)
    if last is None or not last.special:  # an id of text would be left out of every text
        raise UserError(
            f"{where}: its last id, {tokenizer.boundary}, is {model.id_to_token(tokenizer.boundary)!r},"
            f" expected a special token that no text becomes, like {BOUNDARY}"
        )
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError("byte pairs need tokenizers: pip install 'dist-train[data]'") from error
    return tokenizers
