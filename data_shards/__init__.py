"""Tar shards in, batches out: write, index, order, read, transform, load."""
