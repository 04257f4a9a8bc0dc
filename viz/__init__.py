"""Pictures and reports: overlays, legends, contact sheets, plots, tables."""
