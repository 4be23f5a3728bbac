"""English prose about Python, which every Python brings along."""

from __future__ import annotations

from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.text import Document, token_source
from dist_train.data_shards.write import FRACTIONS


def python_text(
    block: int = 128, tokens: str = "byte", vocab_size: int | None = None, join: bool = False
) -> Source:
    """English prose about Python, from this interpreter's own `pydoc_data.topics`; a byte is a token."""
    from pydoc_data.topics import topics

    texts = {topic.replace(".", "_"): text.encode() for topic, text in sorted(topics.items())}
    return token_source(
        "python-text",
        shared_out(texts),
        "pydoc_data.topics of the Python that packed it: topics of the language reference",
        "PSF-2.0",
        block,
        tokens,
        vocab_size,
        join,
    )


def shared_out(texts: dict[str, bytes]) -> list[Document]:
    """Give each text, in order, to the split that is then the least full for its fraction.

    Fewer than a hundred topics differ so much in size that their keys alone could leave a split nearly empty.
    """
    filled = dict.fromkeys(FRACTIONS, 0)
    shared = []
    for key, text in texts.items():
        split = min(FRACTIONS, key=lambda name: (filled[name] + len(text)) / FRACTIONS[name])
        filled[split] += len(text)
        shared.append((split, key, text))
    return shared
