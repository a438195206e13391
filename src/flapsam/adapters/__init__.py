"""What a run leaves, and what one does with it: the adapter, its card, prediction, evaluation, export."""
