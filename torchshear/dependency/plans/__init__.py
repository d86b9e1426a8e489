"""A choice of units, what follows from it for every tensor, and the plan that says so, in memory and on disk."""
