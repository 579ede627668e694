"""From published data sets to training files: filters, duplicates, contamination, splits."""
