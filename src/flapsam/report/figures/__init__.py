"""The charts of the report, a file each: a run's figures → a section."""
