"""Writing a trained model to a folder, one module per format, and checking what was written."""
