"""Hugging Face checkpoints, read without transformers: only the bytes of the slots asked for."""

from expertmesh.checkpoint.checkpoint import Checkpoint, slot_digest
from expertmesh.checkpoint.families import FAMILIES

__all__ = ["FAMILIES", "Checkpoint", "slot_digest"]
