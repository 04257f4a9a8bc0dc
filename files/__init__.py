"""What is read from and written to the disk: data sets, photos and labels, weight files."""
