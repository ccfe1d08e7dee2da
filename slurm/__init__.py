"""Starts `pretrain` on a cluster."""
