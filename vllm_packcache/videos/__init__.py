"""Videos over HTTP: jobs, their store, and the routes of the dialect that their clients speak."""
