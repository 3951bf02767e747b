"""Side-by-side measurements against the real tools. `./lab bench NAME` runs one in a clean lab machine."""
