"""Where results are kept: in memory, on disk, in tiers of both."""
