"""English prose about Python, which every Python brings along."""

from __future__ import annotations

from dist_train.data_shards.sources.source import Source
from dist_train.data_shards.sources.text import Document, pieces, shared_out


def python_text(block: int = 128) -> Source:
    """English prose about Python, from this interpreter's own `pydoc_data.topics`; a byte is a token."""
    from pydoc_data.topics import topics

    documents: list[Document] = [
        (None, topic.replace(".", "_"), text.encode()) for topic, text in sorted(topics.items())
    ]
    return Source(
        "python-text",
        pieces(shared_out(documents), block),
        "pydoc_data.topics of the Python that packed it: topics of the language reference",
        "PSF-2.0",
        vocabulary=256,
    )
