"""`python -m torchshear.cli`."""

from torchshear.cli import main

main()
