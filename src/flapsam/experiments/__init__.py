"""Experiments on one machine: simulations, benches, the demo, synthetic data and pretraining."""
