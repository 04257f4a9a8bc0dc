"""Reading and writing files: data sets, photos and labels, weights, results."""
