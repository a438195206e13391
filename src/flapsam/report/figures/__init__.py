"""Charts of the report. Each module turns a run's data into a section with a chart and tables."""
