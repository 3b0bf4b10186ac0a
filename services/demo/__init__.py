"""Shows the suite at work: ``python -m services.demo``; or leaves it running: ``… run``."""
