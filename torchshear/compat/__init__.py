"""Names and files of other pruning tools, each a thin layer over torchshear."""
