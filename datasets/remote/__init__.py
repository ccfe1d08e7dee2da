"""Shards behind a network: ranges that are asked for again, kept on disk, and fetched ahead."""
