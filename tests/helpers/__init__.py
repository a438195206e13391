"""What several tests need: made-up data, runs, hospitals, and the command line."""
