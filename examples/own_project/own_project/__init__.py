"""Parts of one's own for dist-train."""
