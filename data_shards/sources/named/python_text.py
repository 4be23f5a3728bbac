"""English prose about Python, which every Python brings along."""

from __future__ import annotations

from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.text import token_source
from dist_train.data_shards.write import split_of


def python_text(
    block: int = 128, tokens: str = "byte", vocab_size: int | None = None, join: bool = False
) -> Source:
    """English prose about Python, from this interpreter's own `pydoc_data.topics`; splits by topic."""
    from pydoc_data.topics import topics

    keys = {topic: f"topic/{topic.replace('.', '_')}" for topic in sorted(topics)}
    return token_source(
        "python-text",
        [(split_of(key), key, topics[topic].encode()) for topic, key in keys.items()],
        "pydoc_data.topics of the Python that packed it: topics of the language reference",
        "PSF-2.0",
        block,
        tokens,
        vocab_size,
        join,
    )
