"""The user's model: checked, copied, run in a mode of ours, and left as it was."""
