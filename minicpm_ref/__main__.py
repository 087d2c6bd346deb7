"""`python -m minicpm_ref` is `minicpm-ref`; torchrun starts it this way."""

from minicpm_ref.cli import main

main()
