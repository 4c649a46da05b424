"""A page about runs: one file that needs no network. `gather` reads folders, `curves` draws, `page` writes."""
