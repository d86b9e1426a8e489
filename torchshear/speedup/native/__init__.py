"""The native form of a shrunk model: the user's own module with smaller tensors and other sizes."""
