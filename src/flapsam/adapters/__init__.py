"""The result of a run and its uses: adapter, model card, prediction, evaluation and export."""
