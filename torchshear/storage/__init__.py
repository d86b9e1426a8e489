"""Files: written whole or not at all, read without running anything, and checkpoints one tensor at a time."""
