"""Compensation after the cut: constants folded into biases, and statistics of batch norms estimated anew."""
