"""Many runs: a sweep as a graph of jobs, where those run, and the search for training settings."""
