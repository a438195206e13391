"""Results for people: reports, tables, charts, the viewer, progress and trackers."""
