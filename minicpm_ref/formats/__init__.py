"""The door to other programs: how others write weights and vocabularies, and how ours look to them."""

from minicpm_ref.formats.folder import Contents, read_folder
from minicpm_ref.formats.gguf import read_gguf
from minicpm_ref.formats.granite import to_granite
from minicpm_ref.formats.llama import to_llama
from minicpm_ref.formats.smollm2 import has_smollm2, smollm2_file

__all__ = ["Contents", "has_smollm2", "read_folder", "read_gguf", "smollm2_file", "to_granite", "to_llama"]
