"""What vectors do and how they relate: controls, slopes, comparisons, sums, trims, geometry, monitoring."""
