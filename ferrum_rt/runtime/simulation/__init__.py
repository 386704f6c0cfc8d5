"""The real scheduler and page pool, in virtual time: to prove them on random seeds, and to plan capacity."""
