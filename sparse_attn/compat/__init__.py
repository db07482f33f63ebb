"""Other packages' names and signatures on our operators: change the import, keep the code."""
