"""World models that are played: sessions over HTTP, on the server that serves everything else."""
