"""Names and signatures of other packages, computed by our operators: only the import must be changed."""
