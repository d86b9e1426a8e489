"""Pruning while a model trains, in the user's own loop; its class is `torchshear.PruningSession`."""
