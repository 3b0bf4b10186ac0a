"""A provider as somebody else would write one: it uses what the suite offers, and nothing else."""
