"""What a choice costs: search spaces, corpora, calibration, measuring, the table."""
