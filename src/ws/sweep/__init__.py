"""A sweep as a graph of jobs: the queue, its jobs and where they run."""
