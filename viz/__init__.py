"""What is drawn for people: overlays, legends, sheets, plots, tables, videos."""
