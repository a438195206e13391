"""What a run is: its configuration, its folder, its ledger and its observers."""
