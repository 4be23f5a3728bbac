"""Tokens: text comes back whole, tokenizers are the same whenever trained, and stand beside the shards."""

from pathlib import Path

import numpy as np
import pytest

from dist_train.data_shards import tokens
from dist_train.data_shards.index import Index
from dist_train.data_shards.indexing import check, index_shards
from dist_train.data_shards.reader import Shards
from dist_train.data_shards.sources import pack
from dist_train.data_shards.train_tokenizer import train_tokenizer
from dist_train.data_shards.write import write_shards
from dist_train.errors import UserError

TEXTS = [
    f"The {word} of \u00e9tudes, {i}.\n".encode()
    for i, word in enumerate(["cat", "dog", "crane"] * 20)
]


def error(pattern: str):
    return pytest.raises(UserError, match=pattern)


@pytest.mark.parametrize(("kind", "size"), [("byte", None), ("character", None), ("bpe", 300)])
def test_text_comes_back(kind: str, size: int | None) -> None:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokenizer = tokens.train(kind, iter(TEXTS), size)
    again = tokens.train(kind, iter(TEXTS), size)
    read = tokens.parse(tokenizer.to_json(), "here")
    assert tokenizer.to_json() == again.to_json() == read.to_json()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == tokenizer.dtype and ids.max() < tokenizer.boundary
        assert tokenizer.decode(ids.tolist()) == text == read.decode(read.encode(text).tolist())
    assert tokenizer.decode([tokenizer.boundary, *tokenizer.encode(b"cat")]) == b"cat"
    if kind == "bpe":
        assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2 and tokenizer.vocabulary <= 300
        strange = "\u4e16<|endoftext|>".encode()
        assert tokenizer.decode(tokenizer.encode(strange)) == "\u4e16".encode()
    if kind == "character":
        assert tokenizer.decode(tokenizer.encode("c\u4e16t".encode())) == "c\ufffdt".encode()


def test_wrong_kinds() -> None:
    for kind, size, pattern in [
        ("bytes", None, "did you mean 'byte'"),
        ("bpe", None, "'bpe' needs vocab_size"),
        ("byte", 300, "'byte' has no vocab_size"),
        ("bpe", 20, "at least 257"),
    ]:
        with error(pattern):
            tokens.train(kind, iter(TEXTS), size)
    with error("x: not a tokenizer"):
        tokens.parse("{", "x")
    with error("x: not a tokenizer"):
        tokens.parse('{"kind": "character"}', "x")


def test_a_tokenizer_from_elsewhere_loses_nothing() -> None:
    """Not by its truncation and padding, and not because its last id is a piece of text."""
    library = pytest.importorskip("tokenizers")
    model = tokens.train("bpe", iter(TEXTS), 300).model
    model.enable_truncation(4)
    model.enable_padding(length=1000)
    read = tokens.parse(model.to_str(), "here")
    assert all(read.decode(read.encode(text)) == text for text in TEXTS)
    plain = library.Tokenizer(model.model)  # the same merges, no boundary
    with error("here: its last id, 298, is '.*', expected a special token"):
        tokens.parse(plain.to_str(), "here")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for i, text in enumerate(TEXTS[: 40 if split == "train" else 5]):
            (tmp_path / "texts" / split / f"{i:02d}.txt").write_bytes(text * 3)
    return tmp_path / "texts"


@pytest.mark.parametrize("join", [False, True])
def test_tokenizers_stand_beside_the_shards(texts: Path, tmp_path: Path, join: bool) -> None:
    pytest.importorskip("tokenizers")
    options = {"tokens": "bpe", "vocab_size": 290, "block": 16, "join": join}
    index = pack(texts, tmp_path / "out", **options)
    tokenizer = tokens.load(tmp_path / "out")
    assert index.describe()["vocab_size"] == tokenizer.vocabulary <= 290
    assert index_shards(tmp_path / "out") == index == Index.load(tmp_path / "out")
    shards = Shards(tmp_path / "out", "train")
    pieces = [shards.sample(i)["tokens"] for i in range(len(shards))]
    if join:
        whole = np.concatenate([pieces[0][:1], *(piece[1:] for piece in pieces)])
        documents = np.split(whole, np.flatnonzero(whole == tokenizer.boundary) + 1)
        assert [tokenizer.decode(part.tolist()) for part in documents[:-1]] == [
            t * 3 for t in TEXTS[:40]
        ]
        assert {len(piece) for piece in pieces[:-1]} == {17} and index.tokens["train"] == len(
            whole
        ) - 1
    else:
        first = np.concatenate([pieces[0][:1], *(piece[1:] for piece in pieces[:3])])
        assert tokenizer.decode(first.tolist()).startswith(TEXTS[0])
    path = tmp_path / "out" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))
    assert "tokenizer.json" in check(tmp_path / "out")[0]


def test_a_tokenizer_is_trained_from_shards(texts: Path, tmp_path: Path) -> None:
    """Beside them, named by their index, and used by `tokenise` without a path."""
    pytest.importorskip("tokenizers")
    from dist_train.data import RunData
    from dist_train.recipe import Recipe
    from dist_train.world import World

    rows = [("train", f"{i:02d}", {"txt": text.decode()}) for i, text in enumerate(TEXTS)]
    write_shards(tmp_path / "out", "out", rows, shard_size=9)
    index = train_tokenizer(tmp_path / "out", "bpe", 290)
    own = tokens.load(tmp_path / "out")
    assert own.to_json() == tokens.train("bpe", TEXTS, 290).to_json()
    assert index == Index.load(tmp_path / "out") == index_shards(tmp_path / "out")
    assert check(tmp_path / "out") == [] and index.describe()["vocab_size"] == own.vocabulary
    settings = {
        "data": {
            "path": "out",
            "global_batch": 4,
            "micro_batch": 4,
            "shuffle": "none",
            "transforms": {"train": [{"name": "tokenise", "length": 500}]},
        },
        "duration": "1 steps",
        "model": {"name": "transformer", "vocab_size": "auto", "max_length": 500},
        "objective": {"name": "language_modelling"},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
    }
    (micro,) = RunData(Recipe.restore(settings, "test", tmp_path), World()).batches.batch(0)
    for row, length, text in zip(micro["tokens"], micro["length"], TEXTS, strict=False):
        assert own.decode(row[: length + 1].tolist()) == text
    with pytest.raises(UserError, match=r"no text field 'en' \(there are text\)"):
        train_tokenizer(tmp_path / "out", "byte", fields=["en"])
    pack(texts, tmp_path / "packed", block=16)
    with pytest.raises(UserError, match="tokens already"):
        train_tokenizer(tmp_path / "packed", "byte")


def test_bytes_need_no_tokenizer(texts: Path, tmp_path: Path) -> None:
    index = pack(texts, tmp_path / "out", block=16)
    assert index.vocabulary == 256 and not (tmp_path / "out" / "tokenizer.json").exists()
    assert isinstance(tokens.load(tmp_path / "out"), tokens.ByteTokenizer)
    joined = pack(texts, tmp_path / "joined", block=16, join=True)
    assert joined.vocabulary == 257


def test_a_model_of_byte_pairs_is_trained_and_writes_text(texts: Path, tmp_path: Path) -> None:
    """`vocab_size: auto` is the tokenizer's, and what is generated is text again."""
    pytest.importorskip("tokenizers")
    from dist_train.recipe import Recipe
    from dist_train.run import train
    from dist_train.trained import generate

    pack(texts, tmp_path / "out", tokens="bpe", vocab_size=290, block=16)
    recipe = Recipe(
        project="tokens",
        duration="3 steps",
        strategy="single",
        data={"path": str(tmp_path / "out"), "global_batch": 4, "micro_batch": 4},
        model={
            "name": "transformer",
            "vocab_size": "auto",
            "max_length": "auto",
            "dim": 16,
            "depth": 1,
            "num_heads": 2,
        },
        objective={"name": "language_modelling"},
        optimizer={"name": "adamw", "learning_rate": 0.01},
        callbacks={"checkpoint": {"every": "3 steps"}},
    )
    evaluate = {"split": "validation", "every": "3 steps", "metrics": ["bits_per_byte"]}
    with error("bits_per_byte needs data whose tokens are bytes"):
        train(recipe.set("evaluate", evaluate), run_dir=tmp_path / "refused")
    train(recipe, run_dir=tmp_path / "run")
    made = generate(tmp_path / "run", tmp_path / "text", count=20, prompt="The cat")
    assert made["text"].startswith("The cat") and len(made["text"]) > 7
