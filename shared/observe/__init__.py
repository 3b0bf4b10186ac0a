"""What is seen of the queue from outside: metrics and traces.

Nothing here decides anything. What fails here is logged, and harms no event.
"""
