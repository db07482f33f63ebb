"""Functions with the names and signatures of other packages, computed by our operators: change only the import."""
