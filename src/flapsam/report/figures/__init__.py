"""Charts of the report. Each module turns a run's figures into a section with a chart and tables."""
