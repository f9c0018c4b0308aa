"""Reading dataset files: formats, encodings, row schemas and the counts of a dataset. No torch."""
