"""The door to other programs: how others write weights and vocabularies, and how ours look to them."""

from minicpm_ref.formats.folder import read_tensors

__all__ = ["read_tensors"]
