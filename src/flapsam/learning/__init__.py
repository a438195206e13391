"""How the network learns and predicts: slices, training, inference, scores."""
