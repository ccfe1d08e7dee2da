"""Tar shards: scanned once, listed in a manifest, read by offset and proved by checksum."""
