"""Layers: Mamba-1 and Mamba-2, their selective scan, the multi-grained blocks, and last-step mixers."""
