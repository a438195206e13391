"""What every room builds on: errors, files, seeds, downloads, the machine. It knows nothing of runs."""
