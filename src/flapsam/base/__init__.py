"""What every room builds on: errors, files, seeds, downloads and the machine. It knows nothing about runs."""
