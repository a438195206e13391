"""Training and inference: slices, augmentation, the local fit, prediction and metrics."""
